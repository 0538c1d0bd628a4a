"""The experts' table: row formats, how they convert, and what is saved and loaded."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerlm import PEER, PeerConfig, PeerForCausalLM, ProductKeyMemory
from peerlm.layers import ExpertTable, Table
from peerlm.layers.table import ROW_FORMATS
from peerlm.ops.row_formats import movable, quantise, widened
from peerlm.ops.row_updates import watch_rows
from peerlm.testing import assert_within_budget, definition, gradient_of, relative_error

PAIRS = list(itertools.product(ROW_FORMATS, ROW_FORMATS))
# Of the rows, relative to those in float32: bfloat16 rounds by at most 2^-8, int8 by half of 1 / 127 of the largest,
# float8 with 3 bits behind the point by at most 2^-4. Of 32 normal numbers the largest is 2.1 on average. An int4 step
# is a seventh of it, and an error within it has a root mean square of 0.29 steps.
ERRORS = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1e-2, "int4": 0.1, "float8_e4m3fn": 2**-4}
SCALED = ("int8", "float8_e4m3fn")
FLOATS = ("float32", "bfloat16")
DIM = 32


def table(row_format: str = "float32", *, gated: bool = False, backend: str = "auto") -> ExpertTable:
    return ExpertTable(25, DIM, gated=gated, row_format=row_format, backend=backend)


def values(experts: ExpertTable) -> Tensor:
    """u, v and, if gated, g as they count, (N, 2 or 3, dim) float32."""
    parts = [experts.down, experts.up] + ([experts.gate] if experts.gate is not None else [])
    return torch.stack([part.detach().float() for part in parts], dim=1)


def call(experts: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x, weights = torch.randn(7, DIM, generator=generator), torch.rand(7, 4, generator=generator)
    return experts(x.to(dtype), weights.to(dtype), torch.randint(25, (7, 4), generator=generator)).detach()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_what_is_stored(row_format: str, gated: bool) -> None:
    experts = table(row_format, gated=gated)
    parts = 3 if gated else 2
    assert experts.row_format == row_format
    assert experts.rows.shape == (25, parts, DIM // 2 if row_format == "int4" else DIM)
    assert experts.rows.dtype == ROW_FORMATS[row_format]
    assert experts.rows.requires_grad == (row_format in FLOATS)
    assert (experts.scales is None) == (row_format in FLOATS)
    assert sorted(experts.state_dict()) == (["rows", "scales"] if row_format not in FLOATS else ["rows"])
    assert experts.gate is None or experts.gate.shape == (25, DIM)
    assert f"row_format={row_format!r}" in repr(experts)
    std = values(experts).std(dim=(0, 2))
    expected = torch.tensor([DIM**-0.5, 1.0, DIM**-0.5])[:parts]
    torch.testing.assert_close(std, expected, rtol=0.15, atol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_conversion(before: str, after: str, gated: bool) -> None:
    experts = table(before, gated=gated)
    rows, y = values(experts), call(experts)
    experts.convert_rows(after)
    assert experts.row_format == after
    assert experts.rows.requires_grad == (after in FLOATS)
    assert relative_error(values(experts), rows) <= ERRORS[after]
    if after == "float32":
        assert_within_budget(call(experts), y, call(definition(experts), torch.float64))
    assert relative_error(call(experts), y) <= 4 * (ERRORS[after] or 2**-8)
    again = values(experts)
    experts.convert_rows("float32")
    assert torch.equal(values(experts), again)


class LargeResults(TorchDispatchMode):
    """Collects the sizes in bytes of new memory that operators give out, beginning with some size."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in before:
                size = each.untyped_storage().nbytes()
                self.sizes += [size] if size >= self.least else []
        return found


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "int8"), ("float32", "int4"), ("int4", "float32"), ("int8", "bfloat16")]
)
def test_conversion_takes_memory_for_the_new_rows_and_for_a_few_wide_ones(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = ExpertTable(2048, DIM, row_format=before)
    kept = copy.deepcopy(experts)
    kept.convert_rows(after)  # at once
    monkeypatch.setattr("peerlm.layers.table._WIDE_BYTES", 16384)
    with LargeResults(least=33_000) as large:
        experts.convert_rows(after)
    new = [tensor.nbytes for tensor in (experts.rows, experts.scales) if tensor is not None and tensor.nbytes >= 33_000]
    assert large.sizes == new
    assert new
    for ours, theirs in zip(experts.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(movable(ours), movable(theirs))


@pytest.mark.parametrize(("saved", "loaded"), [("float32", "int8"), ("int8", "float32"), ("int4", "bfloat16")])
def test_loading_another_format_widens_a_few_rows_at_a_time(
    saved: str, loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, experts = ExpertTable(2048, DIM, row_format=saved).state_dict(), ExpertTable(2048, DIM, row_format=loaded)
    kept = copy.deepcopy(experts)
    kept.load_state_dict(state)  # at once
    monkeypatch.setattr("peerlm.layers.table._WIDE_BYTES", 16384)
    with LargeResults(least=33_000) as large:
        experts.load_state_dict(state)
    assert large.sizes == []
    for ours, theirs in zip(experts.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(movable(ours), movable(theirs))


@pytest.mark.parametrize("row_format", ["int8", "int4"])
def test_rows_of_16_bits_are_stored_with_scales_of_32(row_format: str) -> None:
    rows, experts = torch.randn(9, 2, DIM).bfloat16(), ExpertTable(9, DIM, row_format=row_format)
    experts.write(rows)
    found = values(experts)
    experts.write(rows.float())
    assert torch.equal(found, values(experts))


def test_appended_rows_are_widened_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (ExpertTable(2048, DIM, row_format="int8") for _ in range(2))
    expected = torch.cat([values(first), values(second)])
    monkeypatch.setattr("peerlm.layers.table._WIDE_BYTES", 16384)
    with LargeResults(least=33_000) as large:
        first.append([second])
    assert max(large.sizes) == first.rows.nbytes
    torch.testing.assert_close(values(first), expected, rtol=0, atol=1e-6)


def test_conversion_to_the_same_format_keeps_the_parameter() -> None:
    experts = table("float32")
    kept = experts.row_parameters()
    experts.convert_rows("float32")
    assert all(now is before for now, before in zip(experts.row_parameters(), kept, strict=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_checkpoints_move_between_formats(saved: str, loaded: str, gated: bool) -> None:
    source, target = table(saved, gated=gated), table(loaded, gated=gated)
    state = source.state_dict()
    names, rows = sorted(state), state["rows"]
    assert not torch.allclose(values(source), values(target))
    result = target.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert target.row_format == loaded
    assert target.rows.requires_grad == (loaded in FLOATS)
    assert relative_error(values(target), values(source)) <= ERRORS[loaded]
    assert sorted(state) == names  # what is loaded is left as it is
    assert state["rows"] is rows
    if saved == loaded:
        assert torch.equal(call(target), call(source))


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_checkpoints_of_whole_layers_move_between_formats_and_backends(saved: str, loaded: str) -> None:
    settings = {"num_experts": 25, "heads": 2, "experts_per_head": 3, "key_dim": 8}
    source = PEER(DIM, row_format=saved, backend="reference", **settings).eval()
    target = PEER(DIM, row_format=loaded, **settings).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(9, DIM)
    if loaded == "float32":
        assert_within_budget(target(x), source(x), definition(source)(x.double()))
    assert relative_error(target(x).detach(), source(x).detach()) <= 4 * (ERRORS[loaded] or 2**-8)


@pytest.mark.parametrize("scaled", SCALED)
def test_8_bit_rows_without_their_scales_are_not_loaded(scaled: str) -> None:
    state = table(scaled).state_dict()
    del state["scales"]
    for row_format in ROW_FORMATS:
        with pytest.raises(RuntimeError, match="scales"):
            table(row_format).load_state_dict(state)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_rows_of_another_shape_are_not_loaded(saved: str, loaded: str) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for rows.*\[25, 3, (32|16)\].*\[25, 2, (32|16)\]"):
        table(loaded).load_state_dict(table(saved, gated=True).state_dict())


@given(st.integers(1, 5), st.integers(2, 3), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 1000))
def test_quantisation(count: int, parts: int, dim: int, exponent: int, seed: int) -> None:
    rows = torch.randn(count, parts, dim, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rows[0, 0] = 0
    eighth, their_scales = quantise(rows, torch.float8_e4m3fn)
    assert eighth.dtype == torch.float8_e4m3fn
    # 3 bits behind the point, and below 2^-6 steps of 2^-9
    error = (widened(eighth, their_scales) - rows).abs()
    assert (error <= torch.maximum(rows.abs() * 2**-4, their_scales[..., None] * 2**-10) * 1.001).all()
    assert torch.equal(eighth.float().abs().amax(dim=-1) == 448, their_scales > 0)
    quantised, scales = quantise(rows)
    assert quantised.dtype == torch.int8
    assert scales.shape == (count, parts)
    step = rows.abs().amax(dim=-1, keepdim=True) / 127
    assert ((quantised * scales[..., None] - rows).abs() <= 0.501 * step).all()
    assert (quantised.abs().amax(dim=-1) == 127).sum() == (scales > 0).sum()
    assert torch.equal(quantised[0, 0], torch.zeros(dim, dtype=torch.int8))


@pytest.mark.parametrize(
    "build",
    [
        lambda row_format: table(row_format),
        lambda row_format: PEER(8, num_experts=4, heads=1, experts_per_head=1, key_dim=2, row_format=row_format),
    ],
    ids=["table", "layer"],
)
def test_unknown_row_format(build: object) -> None:
    with pytest.raises(ValueError, match="row_format is 'int3'; choose one of float32, bfloat16, int8"):
        build("int3")
    with pytest.raises(ValueError, match="row_format is 'int3'; choose one of float32, bfloat16, int8"):
        table().convert_rows("int3")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_a_table_cast_to_another_dtype_shows_and_computes(row_format: str, dtype: torch.dtype) -> None:
    experts = table(row_format)
    y = call(experts)
    cast = experts.to(dtype)
    assert "row_format=" in repr(cast)
    exact = call(definition(experts), torch.float64)
    if dtype == torch.float64:
        assert_within_budget(call(cast), y, exact)
    assert relative_error(call(cast), exact) <= 4 * torch.finfo(torch.bfloat16).eps


def test_int8_rows_get_no_gradient_but_pass_one_on() -> None:
    experts = table("int8")
    x, weights = torch.randn(7, DIM, requires_grad=True), torch.rand(7, 4, requires_grad=True)
    experts(x, weights, torch.randint(25, (7, 4))).sum().backward()
    assert all(parameter.grad is None for parameter in experts.row_parameters())
    assert x.grad is not None
    assert weights.grad is not None


class Watcher:
    """Writes down which rows are asked for."""

    def __init__(self, *, sparse: bool = False):
        self.sparse = sparse
        self.read: list[object] = []

    def before_read(self, parameter: Tensor, ids: Tensor | None) -> None:
        self.read.append(None if ids is None else sorted(set(ids.flatten().tolist())))

    def takes_row_gradients(self, parameter: Tensor) -> bool:
        return self.sparse

    def fused_update(self, parameter: Tensor) -> None:
        return None

    def release(self, parameter: Tensor) -> None:
        self.read.append("released")


def watch(watched: Table, watcher: Watcher) -> None:
    for parameter in watched.row_parameters():
        watch_rows(parameter, watcher)


def test_a_watcher_learns_of_every_read() -> None:
    experts, watcher = table(), Watcher()
    watch(experts, watcher)
    ids = torch.tensor([[3, 1], [3, 7]])
    experts(torch.randn(2, DIM), torch.rand(2, 2), ids)
    assert [ids for ids in watcher.read if ids] == [[1, 3, 7]]
    for read in (
        lambda: experts.down,
        experts.eval,
        experts.state_dict,
        lambda: experts.load_state_dict(table().state_dict()),
    ):
        watcher.read.clear()
        read()
        assert None in watcher.read
    watch(experts, Watcher())
    assert watcher.read[-1] == "released"


def test_a_memory_has_a_watcher_too() -> None:
    memory, watcher = ProductKeyMemory(8, num_values=16, heads=2, values_per_head=3, key_dim=4), Watcher(sparse=True)
    watch(memory.values, watcher)
    parts = len(memory.values.parts())
    _, ids = memory.product_keys(torch.ones(1, 8))
    memory.eval()
    watcher.read.clear()
    memory(torch.randn(5, 8)).sum().backward()
    assert len(watcher.read) == parts
    assert all(parameter.grad.is_sparse for parameter in memory.values.row_parameters())
    assert ids.shape == (1, 2, 3)
    watcher.read.clear()
    memory.load_state_dict(memory.state_dict())
    assert set(watcher.read) == {None}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_watcher_says_which_gradient_it_takes(sparse: bool, backend: str) -> None:
    experts = table(backend=backend)
    watch(experts, Watcher(sparse=sparse))
    experts(torch.randn(2, DIM), torch.rand(2, 2), torch.tensor([[3, 1], [3, 7]])).square().sum().backward()
    assert all(parameter.grad.is_sparse == sparse for parameter in experts.row_parameters())
    touched = gradient_of(experts).abs().sum(dim=(1, 2)).nonzero().flatten()
    assert touched.tolist() == [1, 3, 7]


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_a_language_model_keeps_its_row_format(row_format: str, tmp_path: Path) -> None:
    config = PeerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        ffw_layers="peer",
        peer={"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "row_format": row_format},
    )
    model = PeerForCausalLM(config).eval()
    experts = model.model.layers[0].ffw.experts
    assert experts.row_format == row_format
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path).eval()
    again = loaded.model.layers[0].ffw.experts
    assert again.row_format == row_format
    assert torch.equal(values(again), values(experts))
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("row_format", SCALED)
def test_casts_leave_8_bit_rows_and_keep_scales_in_32_bits(row_format: str, tmp_path: Path) -> None:
    peer = PEER(DIM, num_experts=25, heads=2, experts_per_head=3, key_dim=8, row_format=row_format)
    rows, scales = peer.experts.rows.clone(), peer.experts.scales.clone()
    for dtype, of_scales in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        cast = copy.deepcopy(peer).to(dtype)
        assert cast.product_keys.sub_keys.dtype == dtype
        assert torch.equal(cast.experts.rows.view(torch.uint8), rows.view(torch.uint8))
        assert cast.experts.rows.dtype == rows.dtype
        assert cast.experts.scales.dtype == of_scales
        assert torch.equal(cast.experts.scales.float(), scales)
    assert peer.to("meta").experts.rows.dtype == rows.dtype


@pytest.mark.parametrize("row_format", SCALED)
def test_a_model_in_bfloat16_has_the_8_bit_rows_that_were_saved(row_format: str, tmp_path: Path) -> None:
    peer = {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "row_format": row_format}
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    PeerForCausalLM(PeerConfig(**settings, ffw_layers="peer", peer=peer)).save_pretrained(tmp_path)
    whole = PeerForCausalLM.from_pretrained(tmp_path).model.layers[0].ffw.experts
    loaded = PeerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    experts = loaded.model.layers[0].ffw.experts
    assert (loaded.dtype, experts.row_format, experts.scales.dtype) == (torch.bfloat16, row_format, torch.float32)
    assert torch.equal(experts.read(), whole.read())
    assert not experts.requires_grad
    loaded.generate(torch.randint(64, (1, 3)), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("row_format", SCALED)
def test_8_bit_rows_are_selected_appended_and_gathered_by_their_bits(row_format: str) -> None:
    experts, more = table(row_format), table(row_format)
    before, ids = experts.read(), torch.tensor([[3, 24], [0, 3]])
    assert torch.equal(experts.gather(ids), before[ids])
    assert torch.equal(experts.gather(ids, 1), before[ids, 1])
    assert experts.fused_with([more]) is None
    experts.append([more])
    assert torch.equal(experts.read(), torch.cat([before, more.read()]))
    experts.select(torch.tensor([30, 2]))
    assert torch.equal(experts.read(), torch.stack([more.read()[5], before[2]]))
