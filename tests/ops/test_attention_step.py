"""Attention of one new token in one native call: against its definition, and what it refuses."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.attention_step import AttentionStep, RMSNorm, Shift
from peerlm.ops.cpu import native
from peerlm.ops.whole_layer import DenseLayer
from peerlm.testing import assert_within_budget

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")


def step_of(dim: int = 21, heads: int = 6, groups: int = 3, size: int = 10, **settings: Any) -> AttentionStep:
    torch.manual_seed(0)
    norm = {name: RMSNorm(weight=torch.rand(dim) + 0.5, epsilon=1e-5) for name in ("before", "after")}
    maps = {"query": (heads * size, dim), "key": (groups * size, dim), "value": (groups * size, dim)}
    weights = {f"{name}_map": torch.randn(shape) / dim**0.5 for name, shape in maps.items()}
    values: dict[str, Any] = {
        **norm,
        **weights,
        "output_map": torch.randn(dim, heads * size),
        "query_norm": None,
        "key_norm": None,
        "frequencies": torch.rand(size // 2),
        "rotation_scale": 1.1,
        "scaling": 0.3,
    }
    return AttentionStep(**(values | settings))


def shift_of(groups: int) -> Shift:
    torch.manual_seed(1)
    return Shift(**{name: torch.randn(groups) for name in ("key", "previous_key", "value", "previous_value")})


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    return norm.weight.to(x) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)


def defined(
    step: AttentionStep, hidden: Tensor, added: Tensor, keys: Tensor, values: Tensor, mask: Tensor, positions: Tensor
) -> dict[str, Tensor]:
    """Everything that a step changes or gives, in the dtype of `hidden`."""
    hidden, keys, values = hidden + added, keys.clone(), values.clone()
    rows, groups, _, size = values.shape
    read = normed(hidden, step.before)

    def heads(weight: Tensor, norm: RMSNorm | None, *, turned: bool) -> Tensor:
        each = (read @ weight.to(read).T).view(rows, -1, size)
        each = each if norm is None else normed(each, norm)
        angles = (positions.to(read) * step.frequencies.to(read))[:, None]
        low, high = each.chunk(2, dim=-1)
        cos, sin = angles.cos() * step.rotation_scale, angles.sin() * step.rotation_scale
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1) if turned else each

    query = heads(step.query_map, step.query_norm, turned=True)
    keys[:, :, -1, :size] = heads(step.key_map, step.key_norm, turned=True)
    values[:, :, -1] = heads(step.value_map, None, turned=False)
    cached = keys, values
    if step.shift is not None:
        seen_before = mask[:, -2] if mask.shape[1] > 1 else torch.zeros(rows)
        keys[:, :, -1, size] = ((positions[:, 0] > 0) * seen_before).to(keys)[:, None]
        keys, values = shifted(step.shift, step.frequencies.to(keys), keys, values)
    of_group = query.view(rows, groups, -1, size)
    scores = torch.einsum("rghc,rglc->rghl", of_group, keys) * step.scaling
    scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    seen = torch.einsum("rghl,rglc->rghc", scores.softmax(-1), values).reshape(rows, 1, -1)
    hidden = hidden + seen @ step.output_map.to(seen).T
    return {"hidden": hidden, "keys": cached[0], "values": cached[1], "normed": normed(hidden, step.after)}


def shifted(shift: Shift, frequencies: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, without the number that says what follows what, and values as attention sees them, slot by slot."""
    key, previous_key, value, previous_value = (each.to(keys)[:, None] for each in shift.tensors())
    size = values.shape[-1]
    mixed_keys, mixed_values = [], []
    for slot in range(keys.shape[2]):
        own_key, own_value = key * keys[:, :, slot, :size], value * values[:, :, slot]
        if slot > 0:
            follows = keys[:, :, slot, size:]
            low, high = keys[:, :, slot - 1, :size].chunk(2, dim=-1)
            cos, sin = frequencies.cos(), frequencies.sin()
            on_by_one = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
            own_key = own_key + previous_key * follows * on_by_one
            own_value = own_value + previous_value * follows * values[:, :, slot - 1]
        mixed_keys.append(own_key)
        mixed_values.append(own_value)
    return torch.stack(mixed_keys, 2), torch.stack(mixed_values, 2)


def inputs(step: AttentionStep, rows: int, columns: int) -> list[Tensor]:
    dim, size = len(step.before.weight), 2 * len(step.frequencies)
    shape = (rows, len(step.key_map) // size, columns, size)
    keys = torch.randn(shape)
    if step.shift is not None:
        keys = torch.cat([keys, torch.randint(2, (*shape[:3], 1)).float()], dim=-1)
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, : columns // 2] = 0
    positions = torch.arange(rows)[:, None] + columns
    return [
        torch.randn(rows, 1, dim),
        torch.randn(rows, 1, dim),
        keys,
        torch.randn(shape),
        mask,
        positions,
    ]


@pytest.mark.numerical
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (5, 40)])
@pytest.mark.parametrize("normed_heads", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
def test_it_is_its_definition(
    rows: int, columns: int, normed_heads: bool, with_shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(shift=shift_of(3) if with_shift else None)
    if normed_heads:
        norm = RMSNorm(weight=torch.rand(10) + 0.5, epsilon=1e-5)
        step = replace(step, query_norm=norm, key_norm=replace(norm, weight=torch.rand(10) + 0.5))
    call = api.attention_step(step)
    assert call is not None
    given = inputs(step, rows, columns)
    plain = defined(step, *given)
    exact = defined(step, *[each.double() if each.is_floating_point() else each for each in given])
    bits = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        own = [each.clone() for each in given]
        y = call(*own)
        assert y is not None
        bits.append({"hidden": own[0], "keys": own[2], "values": own[3], "normed": y})
        assert_within_budget(bits[-1], plain, exact)
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])


@pytest.mark.numerical
@pytest.mark.parametrize("with_shift", [False, True])
def test_large_steps_have_the_same_bits_for_any_number_of_threads(
    with_shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(dim=515, heads=8, groups=4, size=64, shift=shift_of(4) if with_shift else None)
    call = api.attention_step(step)
    assert call is not None
    given, found = inputs(step, 2, 400), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        own = [each.clone() for each in given]
        found.append([call(*own), *own])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_it_cannot_take_is_left_as_it_was() -> None:
    step = step_of()
    call = api.attention_step(step)
    assert call is not None
    hidden, added, keys, values, mask, positions = inputs(step, 2, 6)
    hiding = mask.clone()
    hiding[1, -1] = 0
    wide = torch.randn(2, 3, 6, 20)
    for wrong in (
        (hidden, added, keys, values, hiding, positions),
        (hidden.double(), added, keys, values, mask, positions),
        (hidden, added[:1], keys, values, mask, positions),
        (hidden, added, keys[:, :2], values[:, :2], mask, positions),
        (hidden, added, keys, values[:, :, 1:], mask, positions),
        (hidden, added, keys.double(), values.double(), mask, positions),
        (hidden, added, wide[..., :10], wide[..., 10:], mask, positions),
        (hidden, added, keys, values, mask[:, 1:], positions),
        (hidden, added, keys, values, mask.bool(), positions),
        (hidden, added, keys, values, mask, positions[:, 0]),
        (hidden, added, keys, values, mask, positions.int()),
        (hidden.new_zeros(2, 2, 21), added, keys, values, mask, positions),
    ):
        before = [None if each is None else each.clone() for each in wrong]
        assert call(*wrong) is None
        assert all(torch.equal(each, was) for each, was in zip(wrong, before, strict=True) if was is not None)
    assert call(hidden, None, keys, values, None, positions[:1]) is not None
    with_shift = api.attention_step(replace(step, shift=shift_of(3)))
    assert with_shift is not None
    assert with_shift(hidden, None, keys, values, None, positions) is None  # keys lack the number that is one more
    assert call(hidden, None, inputs(replace(step, shift=shift_of(3)), 2, 6)[2], values, None, positions) is None


def test_weights_that_it_cannot_read_have_no_call() -> None:
    step = step_of()
    assert api.attention_step(replace(step, key_map=step.key_map.double())) is None
    assert api.attention_step(replace(step, key_map=step.key_map.T.contiguous().T)) is None
    assert api.attention_step(replace(step, before=RMSNorm(weight=torch.rand(21).bfloat16(), epsilon=1e-5))) is None
    assert api.added_norm(RMSNorm(weight=torch.rand(21).half(), epsilon=1e-5)) is None
    with pytest.raises(ValueError, match="do not fit"):
        api.attention_step(replace(step, output_map=torch.randn(21, 59)))
    with pytest.raises(ValueError, match="weights of a shift do not fit"):
        api.attention_step(replace(step, shift=shift_of(2)))
    assert api.attention_step(replace(step, shift=replace(shift_of(3), value=torch.rand(3).double()))) is None
    with pytest.raises(ValueError, match="do not fit"):
        api.whole_layer(DenseLayer(down=torch.randn(3, 4), gate=None, up=torch.randn(4, 5), activation="gelu"))


def test_all_blocks_are_what_their_parts_are() -> None:
    steps = [step_of(rotation_scale=scale) for scale in (1.0, 0.7)]
    dense = [
        DenseLayer(down=torch.randn(9, 21), gate=gate, up=torch.randn(21, 9), activation="silu")
        for gate in (None, torch.randn(9, 21))
    ]
    calls, layers = [api.attention_step(step) for step in steps], [api.whole_layer(layer) for layer in dense]
    last = api.added_norm(steps[0].after)
    through = api.through_blocks(calls, layers, last)  # type: ignore[arg-type]
    assert through is not None
    hidden, _, *columns, mask, positions = inputs(steps[0], 3, 7)
    others = [[each.clone() for each in columns] for _ in steps]
    own, added, states = [[each.clone() for each in columns] for _ in steps], None, hidden.clone()
    for call, layer, pair in zip(calls, layers, own, strict=True):
        added = layer(call(states, added, *pair, mask, positions))
    found = through(hidden.clone(), [tuple(pair) for pair in others], mask, positions)
    assert torch.equal(found, last(states, added))
    assert all(torch.equal(a, b) for one, two in zip(own, others, strict=True) for a, b in zip(one, two, strict=True))
    mask[2, -1] = 0
    assert through(hidden.clone(), [tuple(pair) for pair in others], mask, positions) is None
    assert through(hidden.clone(), [tuple(columns), (wide := torch.randn(3, 3, 8, 10), wide)], None, positions) is None
    assert api.through_blocks(calls, [lambda x: x, layers[1]], last) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="widths of blocks differ"):
        api.through_blocks(calls, layers, api.added_norm(RMSNorm(weight=torch.rand(20), epsilon=1e-5)))  # type: ignore[arg-type]


def test_a_module_of_older_sources_has_no_such_calls_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(target=lambda: "avx2", runnable_targets=lambda: "avx2")
    assert "older sources" not in native.description()
    monkeypatch.setattr(native, "module", older)
    step = step_of()
    assert api.attention_step(step) is None
    assert api.added_norm(step.before) is None
    assert api.whole_layer(DenseLayer(down=torch.ones(2, 3), gate=None, up=torch.ones(3, 2), activation="relu")) is None
    assert native.description().endswith("built from older sources, so that few tokens are slow: install it again")
