"""A whole layer for a few tokens in one native call: it is the layer, and steps aside for whoever looks on."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peerlm import PEER
from peerlm.ops.cpu import native
from peerlm.testing import relative_error

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


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each output that one call made."""
    seen: list[int] = []
    real = PEER._in_one_call

    def counted(self: PEER, x: Tensor, mask: Tensor | None) -> Tensor | None:
        y = real(self, x, mask)
        seen.extend([x.numel() // self.dim] if y is not None else [])
        return y

    monkeypatch.setattr(PEER, "_in_one_call", counted)
    return seen


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(**KINDS[kind]), calls(monkeypatch)
    for tokens in (1, 4):
        x = torch.randn(tokens, 64)
        assert relative_error(layer(x), in_parts(layer, x)) < 2e-6
    assert seen == [1, 4]


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
        assert relative_error(found, in_parts(layer, x)) < 2e-6
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
    layer(torch.randn(5, 64))
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
