import pytest
import torch
from torch import nn

from peerlm.convert.peer_pytorch import arrange_query, arrange_sub_keys, from_peer_pytorch

PeerPytorch = pytest.importorskip("PEER_pytorch").PEER
SMALL = {"heads": 3, "num_experts": 81, "num_experts_per_head": 4, "dim_key": 5}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"non_competing_scores": False},
        {"non_competing_scores": False, "product_key_topk": 9, "activation": nn.SiLU},
        {"non_competing_scores": False, "num_experts_per_head": 9, "activation": nn.ReLU},
        {"activation": nn.Identity, "dropout": 0.25},
        {"activation": lambda: nn.GELU("tanh"), "non_competing_scores": False},
    ],
)
def test_outputs_and_gradients_are_theirs(options) -> None:
    torch.manual_seed(0)
    theirs = PeerPytorch(8, **(SMALL | options)).double().eval()
    nn.init.normal_(theirs.keys)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    torch.set_default_dtype(torch.float64)
    try:
        ours = from_peer_pytorch(theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    (mine,) = torch.autograd.grad(ours(x).square().sum(), x)
    (other,) = torch.autograd.grad(theirs(x).square().sum(), x)
    torch.testing.assert_close(mine, other)
    assert not ours.training
    assert ours.dropout == options.get("dropout", 0.0)


def test_their_defaults_retrieve_one_expert_per_head() -> None:
    ours = from_peer_pytorch(PeerPytorch(8, heads=2, num_experts=400))
    _, expert_ids = ours.retrieve(torch.randn(5, 8))
    assert expert_ids.shape == (5, 2, 1)
    assert ours.product_keys.weighting == "relu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separate_embed_per_head": True}, "separate_embed_per_head is True"),
        ({"pre_rmsnorm": True}, "pre_rmsnorm is True; take the norm out"),
        ({"activation": nn.Tanh}, r"the activation is Tanh\(\); layers with one of GELU"),
        ({"non_competing_scores": False, "product_key_topk": 3}, "product_key_topk is 3, less than the 4 experts"),
    ],
)
def test_what_ours_has_not_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        from_peer_pytorch(PeerPytorch(8, **(SMALL | options)))


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear is no PEER of PEER-pytorch, for it lacks weight_down_embed"):
        from_peer_pytorch(nn.Linear(2, 2))


@pytest.mark.parametrize("layout", ["phnd", "hnpd", "dnhp", "peerlm", "PEER-pytorch", "npd"])
def test_sub_keys_of_any_order(layout) -> None:
    ours = torch.randn(2, 1 if layout == "npd" else 3, 5, 4)
    letters = {"peerlm": "phnd", "PEER-pytorch": "hnpd"}.get(layout, layout)
    equation = f"phnd->{letters}" if "h" in letters else f"pnd->{letters}"
    theirs = torch.einsum(equation, ours if "h" in letters else ours[:, 0])
    assert torch.equal(arrange_sub_keys(theirs, layout), ours)


@pytest.mark.parametrize("layout", ["hpd", "phd", "dph"])
def test_queries_of_any_order(layout) -> None:
    ours = torch.randn(3, 2, 4, 6)
    theirs = torch.einsum(f"hpdx->{layout}x", ours).reshape(24, 6)
    assert torch.equal(arrange_query(theirs, layout, heads=3), ours.reshape(24, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: arrange_sub_keys(torch.zeros(2, 3, 5, 4), "phn"),
            r"layout is 'phn' for sub-keys of shape \(2, 3, 5, 4\)",
        ),
        (lambda: arrange_sub_keys(torch.zeros(2, 3, 5, 4), "hpnd"), r"axis p of \(2, 3, 5, 4\) is 3, not 2"),
        (lambda: arrange_query(torch.zeros(24, 6), "hp", heads=3), "layout is 'hp'; take an order of 'hpd'"),
        (lambda: arrange_query(torch.zeros(20, 6), "hpd", heads=3), "20 features, which are not 3 heads"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
