"""A whole layer for a few tokens in one native call: it is the layer, and steps aside for whoever looks on."""

import copy
import pickle
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peerlm import PEER, DenseFFW
from peerlm.layers.one_call import Unchanged, in_one_call
from peerlm.ops.cpu import native
from peerlm.ops.functions import ACTIVATIONS
from peerlm.testing import assert_within_budget, definition, float64

pytestmark = [
    pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}"),
    pytest.mark.whole_tables("one call is made with the rows of `Table` itself alone"),
]

KINDS: dict[str, dict[str, Any]] = {
    "batch": {"query_norm": "batch"},
    "layer, keys per head": {"query_norm": "layer", "shared_keys": False, "heads": 3},
    "no norm, gated": {"query_norm": "none", "gated": True, "activation": "silu"},
    "keys of one length": {"key_norm": True, "weight_scale": 8.0, "activation": "one_plus"},
    "odd widths": {"key_dim": 10, "key_norm": True},
    "shells, sigmoid": {"pairing": "shells", "weighting": "sigmoid"},
    "bfloat16": {"row_format": "bfloat16"},
    "int8": {"row_format": "int8"},
    "float8": {"row_format": "float8_e4m3fn"},
    "int4": {"row_format": "int4"},
}


def layer_of(**settings: Any) -> PEER:
    torch.manual_seed(0)
    layer = PEER(64, **{"num_experts": 1156, "heads": 2, "experts_per_head": 5, "key_dim": 32, **settings})
    if isinstance(layer.product_keys.query_norm, nn.Module) and settings.get("query_norm", "batch") == "batch":
        layer(torch.randn(50, 64))  # statistics that are not those of the start
    return layer.eval()


def in_parts(layer: PEER, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return layer(x).detach()


def exactly(layer: PEER, x: Tensor) -> Tensor:
    with float64():
        return definition(layer)(x.double()).detach()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each output that one call made."""
    seen: list[int] = []

    def counted(layer: PEER, x: Tensor, mask: Tensor | None) -> Tensor | None:
        y = in_one_call(layer, x, mask)
        seen.extend([x.numel() // layer.dim] if y is not None else [])
        return y

    monkeypatch.setattr("peerlm.layers.peer.in_one_call", counted)
    return seen


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(**KINDS[kind]), calls(monkeypatch)
    for tokens in (1, 4, 5, 33, 64):
        x = torch.randn(tokens, 64)
        found, expected = layer(x), in_parts(layer, x)
        assert_within_budget(found, expected, exactly(layer, x))
        assert tokens < 5 or torch.equal(found, expected)
    assert seen == [1, 4, 5, 33, 64]


@pytest.mark.numerical
@torch.no_grad()
def test_many_tokens_have_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(key_norm=True, heads=3, num_experts=128**2)
    x, found = torch.randn(61, 64), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(layer(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_a_forward_of_another_is_called() -> None:
    layer, x = layer_of(), torch.randn(1, 64)
    experts: Any = layer.experts
    experts.forward = lambda x, weights, ids: torch.zeros_like(x)
    assert not layer(x).any()


@torch.no_grad()
def test_what_changes_in_a_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(key_norm=True), calls(monkeypatch)
    x = torch.randn(1, 64)
    before = layer(x)

    def changed(change: Any) -> None:
        nonlocal before
        change()
        found = layer(x)
        assert not torch.equal(found, before)
        assert_within_budget(found, in_parts(layer, x), exactly(layer, x))
        before = found

    changed(lambda: layer.product_keys.sub_keys.data.normal_())
    changed(lambda: setattr(layer.product_keys.sub_keys, "data", torch.randn_like(layer.product_keys.sub_keys)))
    changed(lambda: setattr(layer.product_keys, "experts_per_head", 3))
    changed(lambda: setattr(layer, "weight_scale", 3.0))
    changed(lambda: layer.product_keys.query_norm.running_var.mul_(2))  # type: ignore[operator]
    changed(lambda: layer.experts.convert_rows("int8"))
    assert len(seen) == 7


@torch.no_grad()
def test_it_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(), calls(monkeypatch)
    x = torch.randn(2, 64)
    layer(torch.randn(65, 64))
    layer(x.double().float().T.contiguous().T)  # not contiguous
    in_parts(layer, x)
    layer.train()(x)
    layer.eval()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    for module in (layer.product_keys, layer.product_keys.query_proj, layer.product_keys.query_norm, layer.experts):
        met: list[nn.Module] = []
        hook = module.register_forward_hook(lambda module, inputs, output, met=met: met.append(module))
        layer(x)
        hook.remove()
        assert met == [module]
    layer.double()(x.double())
    assert seen == []
    layer.float()(x)
    assert seen == [2]


@torch.no_grad()
def test_tokens_and_their_mask_keep_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(), calls(monkeypatch)
    x, mask = torch.randn(3, 1, 64), torch.ones(3, 1, dtype=torch.bool)
    y = layer(x, mask)
    assert y.shape == x.shape
    assert torch.equal(y.view(3, 64), layer(x.view(3, 64)))
    assert layer(torch.randn(64)).shape == (64,)
    assert layer(torch.randn(0, 64)).shape == (0, 64)
    assert seen == [3, 3, 1]


@torch.no_grad()
def test_arguments_that_do_not_fit_are_refused_as_elsewhere() -> None:
    layer = layer_of()
    layer(torch.randn(1, 64))
    with pytest.raises(ValueError, match="its last dimension must be the layer's dim = 64"):
        layer(torch.randn(2, 32))
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); for this x it must be \(1, 1\)"):
        layer(torch.randn(1, 1, 64), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        layer(torch.ones(1, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        layer(torch.tensor(1.0))


@torch.no_grad()
def test_a_copy_makes_a_call_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(), calls(monkeypatch)
    x = torch.randn(1, 64)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.experts.rows.zero_()
        assert torch.equal(twin(x), y)
    assert not layer(x).any()
    assert seen == [1, 1, 1, 1]


def dense_of(**settings: Any) -> DenseFFW:
    torch.manual_seed(0)
    return DenseFFW(33, hidden=50, **settings)


@pytest.mark.numerical
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@torch.no_grad()
def test_a_dense_layer_is_one_call_too(activation: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = dense_of(activation=activation, gated=gated)
    for tokens in (1, 5, 8):
        x = torch.randn(tokens, 33)
        actual = layer(x)
        plain = dense_in_parts(layer, x)
        with float64():
            exact = definition(layer)(x.double())
        assert_within_budget(actual, plain, exact)
    one, many = torch.randn(1, 33), torch.randn(7, 33)
    assert torch.equal(layer(one), layer(torch.cat([one, many]))[:1])
    x, found = torch.randn(3, 33), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(layer(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def dense_in_parts(layer: DenseFFW, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return layer(x).detach()


@torch.no_grad()
def test_a_dense_layer_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = dense_of(), torch.randn(2, 33), []

    def counted(layer: DenseFFW, x: Tensor, mask: Tensor | None) -> Tensor | None:
        y = in_one_call(layer, x, mask)
        seen.append(y is not None)
        return y

    monkeypatch.setattr("peerlm.layers.dense.in_one_call", counted)
    layer(x.double().float().T.contiguous().T)
    layer(torch.randn(9, 33))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    hook = layer.up_proj.register_forward_hook(lambda *_: torch.zeros(2, 33))
    assert not layer(x).any()
    hook.remove()
    with pytest.raises(ValueError, match="mask has shape"):
        layer(x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="dim = 33"):
        layer(torch.randn(2, 32))
    layer.double()(x.double())
    assert not any(seen)
    before = layer.float()(x)
    layer.up_proj.weight.data = -layer.up_proj.weight.data
    assert torch.equal(layer(x), -before)
    layer.up_proj = nn.Linear(50, 33)
    assert torch.allclose(layer(x), dense_in_parts(layer, x))
    assert seen[-4:] == [True, True, False, False]
    twin = copy.deepcopy(dense_of())
    assert torch.equal(twin(x), dense_of()(x))


@torch.no_grad()
def test_calls_keep_no_table_alive() -> None:
    layer = layer_of()
    for tokens in (1, 9):
        layer(torch.randn(tokens, 64))
    unchanged = Unchanged()
    unchanged.add_all_of(layer)
    assert unchanged.holds()
    rows, keys = (ref(each) for each in (layer.experts.rows, layer.product_keys.sub_keys))
    layer.experts.convert_rows("int8")
    layer.product_keys.sub_keys = nn.Parameter(torch.zeros(2, 1, 34, 16))
    assert rows() is None
    assert keys() is None
    assert not unchanged.holds()


def test_a_change_of_what_a_call_depends_on_is_seen() -> None:
    for change in (
        lambda layer: setattr(layer, "weight_scale", 2.0),
        lambda layer: setattr(layer.product_keys, "experts_per_head", 2),
        lambda layer: setattr(layer.product_keys.sub_keys, "data", torch.zeros(2, 1, 34, 16)),
        lambda layer: setattr(layer, "packs", nn.Identity()),
        lambda layer: setattr(layer.product_keys, "query_proj", nn.Linear(64, 64)),
        lambda layer: setattr(layer.product_keys, "__class__", type("Other", (type(layer.product_keys),), {})),
        lambda layer: setattr(layer.experts, "watched", True),
        lambda layer: layer.train(),
        lambda layer: layer.experts.register_buffer("scales", torch.ones(1156, 2)),
        lambda layer: setattr(layer.experts, "forward", layer.product_keys.forward),
    ):
        layer, unchanged = layer_of(), Unchanged()
        unchanged.add_all_of(layer)
        assert unchanged.holds()
        assert not any(unchanged.hooks)
        change(layer)
        assert not unchanged.holds()
    layer.register_forward_hook(lambda *_: None)
    assert any(unchanged.hooks)
