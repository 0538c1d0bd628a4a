"""The PEER layer against its equations, its invariances, and its fixed names."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from peerlm import PEER
from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.testing import assert_within_budget, loop_peer

DIM = 6


def small_peer(**settings: Any) -> PEER:
    """16 experts in float64; running statistics and affine maps are drawn, so that none is trivial."""
    settings = {"num_experts": 16, "heads": 3, "experts_per_head": 3, "key_dim": 4} | settings
    layer = PEER(DIM, **settings).double()
    norm = layer.product_keys.query_norm
    with torch.no_grad():
        for tensor in norm.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
        for name, tensor in norm.named_buffers():
            tensor.add_(0.3 * torch.rand_like(tensor)) if name == "running_var" else tensor.normal_()
    return layer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_layer_equals_its_equations(backend: str, shared_keys: bool, weighting: str, query_norm: str) -> None:
    layer = small_peer(backend=backend, shared_keys=shared_keys, weighting=weighting, query_norm=query_norm).eval()
    x = tokens(5)
    torch.testing.assert_close(layer(x).detach(), loop_peer(layer, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_neurons_equal_their_equations(gated: bool, activation: str) -> None:
    layer, x = small_peer(gated=gated, activation=activation).eval(), tokens(5)
    torch.testing.assert_close(layer(x).detach(), loop_peer(layer, x))


@pytest.mark.parametrize(
    "settings",
    [
        {"experts_per_head": 1},
        {"experts_per_head": 4},
        {"heads": 1},
        {"num_experts": 1, "experts_per_head": 1},
        {"num_experts": 4, "experts_per_head": 2, "heads": 8},  # more retrieved than there are
        {"key_dim": 2},
        {"pairing": "shells"},
        {"pairing": "shells", "backend": "reference", "shared_keys": False},
        {"key_norm": True},
        {"key_norm": True, "backend": "reference", "shared_keys": False, "query_norm": "none"},
    ],
    ids=str,
)
def test_edges_equal_the_equations(settings: dict[str, int]) -> None:
    layer, x = small_peer(**settings).eval(), tokens(4)
    torch.testing.assert_close(layer(x).detach(), loop_peer(layer, x))


def test_lengths_of_normalised_keys_do_not_matter() -> None:
    layer, x = small_peer(key_norm=True), tokens(5)
    longer = copy.deepcopy(layer)
    with torch.no_grad():
        longer.product_keys.sub_keys.mul_(torch.rand(longer.product_keys.sub_keys.shape[:-1])[..., None] + 0.5)
    torch.testing.assert_close(longer(x), layer(x))
    layer(x).square().sum().backward()
    keys = layer.product_keys.sub_keys
    assert keys.grad is not None
    assert keys.grad.norm() > 0
    assert ((keys.grad * keys).sum(dim=-1).abs() <= 1e-12 * keys.grad.norm()).all()  # a step only turns them
    assert not torch.equal(small_peer(key_norm=False)(x), small_peer(key_norm=True)(x))
    with torch.no_grad():
        keys[0, 0, 0] = 0  # no direction: its half score is 0
    assert layer(x).isfinite().all()


def test_one_expert_retrieved_by_all_heads_counts_each_time() -> None:
    layer = small_peer(num_experts=1, experts_per_head=1, heads=5)
    x = tokens(4)
    neuron = torch.nn.functional.gelu(x @ layer.experts.down[0])[:, None] * layer.experts.up[0]
    torch.testing.assert_close(layer(x), 5 * neuron)


# Queries are normalised before experts are retrieved, weights are computed after it: each alone, and training alike.
@pytest.mark.parametrize(
    ("weighting", "query_norm", "training"),
    [(weighting, "batch", True) for weighting in WEIGHTINGS]
    + [("softmax", "batch", False), ("softmax", "layer", True), ("softmax", "none", True)],
)
def test_gradients(weighting: str, query_norm: str, training: bool) -> None:
    layer = small_peer(heads=2, weighting=weighting, query_norm=query_norm, backend="reference").train(training)
    x = tokens(4).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh_buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        state = dict(zip(names, parameters, strict=True)) | fresh_buffers
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_gradients_of_the_backends_are_equal() -> None:
    layer, x = small_peer(gated=True, backend="auto"), tokens(7)
    other = small_peer(gated=True, backend="reference")
    other.load_state_dict(layer.state_dict())
    for module in (layer, other):
        module(x).square().sum().backward()
    for (name, parameter), twin in zip(layer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, msg=name)


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_permuting_experts_with_their_keys_changes_nothing(gated: bool, shared_keys: bool) -> None:
    layer, x = small_peer(gated=gated, shared_keys=shared_keys).eval(), tokens(9)
    before, (weights, ids) = layer(x), layer.retrieve(x)
    first, second = torch.randperm(4), torch.randperm(4)
    with torch.no_grad():
        keys = layer.product_keys.sub_keys
        keys.copy_(torch.stack([keys[0][:, first], keys[1][:, second]]))
        rows = layer.experts.rows
        layer.experts.write(rows.unflatten(0, (4, 4))[first][:, second].flatten(0, 1))
    weights_after, ids_after = layer.retrieve(x)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(weights_after, weights)
    assert torch.equal(first[ids_after // 4] * 4 + second[ids_after % 4], ids)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_shapes(shape: tuple[int, ...], training: bool) -> None:
    layer, x = small_peer().train(training), tokens(*shape)
    mask = torch.ones(shape, dtype=torch.bool)
    assert layer(x, mask).shape == x.shape
    weights, ids = layer.retrieve(x, mask)
    assert weights.shape == ids.shape == (*shape, 3, 3)
    assert layer.product_keys.query(x, mask).shape == (*shape, 3, 4)


def test_leading_dimensions_are_only_tokens() -> None:
    layer, x = small_peer(), tokens(2, 3)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x).flatten(0, 1), twin(x.flatten(0, 1)))


def test_x_need_not_be_contiguous() -> None:
    layer, x = small_peer().eval(), tokens(3, 2).transpose(0, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_names_and_shapes_that_others_build_on() -> None:
    layer = PEER(8, num_experts=25, heads=3, experts_per_head=2, key_dim=6, shared_keys=False, gated=True)
    keys, experts = layer.product_keys, layer.experts
    assert keys.sub_keys.shape == (2, 3, 5, 3)
    assert experts.rows.shape == (25, 3, 8)
    for which, part in enumerate((experts.down, experts.up, experts.gate)):
        assert torch.equal(part, experts.rows[:, which])
    assert PEER(8, num_experts=25, heads=3, experts_per_head=2, key_dim=6).product_keys.sub_keys.shape == (
        2,
        1,
        5,
        3,
    )
    assert PEER(8, num_experts=25, heads=3, experts_per_head=2, key_dim=6).experts.gate is None
    assert (keys.parameter_roles, set(experts.parameter_roles.values())) == ({"sub_keys": "keys"}, {"table"})


def test_score_of_an_expert_is_its_key_against_the_query() -> None:
    layer, x = small_peer(weighting="none").eval(), tokens(2, 3)
    keys = layer.product_keys
    weights, ids = layer.retrieve(x)
    query = keys.query(x)
    first, second = keys.sub_keys[:, 0]
    expected = (query[..., None, :2] * first[ids // 4]).sum(-1) + (query[..., None, 2:] * second[ids % 4]).sum(-1)
    torch.testing.assert_close(weights, expected)


def test_paper_settings_are_the_defaults() -> None:
    with torch.device("meta"):
        layer = PEER(512)
    keys = layer.product_keys
    assert (keys.num_experts, keys.heads, keys.experts_per_head, keys.key_dim) == (1024**2, 8, 16, 128)
    assert (keys.shared_keys, keys.weighting, layer.experts.activation) == (True, "softmax", "gelu")
    assert type(keys.query_norm).__name__ == "QueryBatchNorm"


@pytest.mark.usefixtures("float64")
def test_dropout_drops_whole_experts_and_scales_the_others() -> None:
    layer = PEER(16, num_experts=16, heads=1, experts_per_head=4, key_dim=4, dropout=0.25, activation="identity")
    layer.experts.write(torch.eye(16)[:1].expand(16, -1), vector=0)
    layer.experts.write(torch.eye(16), vector=1)  # y[id] = weight of expert id times x[0]
    x = torch.randn(2000, 16)
    x[:, 0] = 1
    twin = copy.deepcopy(layer)
    twin.dropout = 0.0
    kept, full = layer(x), twin(x)
    dropped = (kept == 0) & (full != 0)
    torch.testing.assert_close(kept[~dropped], full[~dropped] / 0.75)
    assert dropped.sum().item() / (2000 * 4) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
def test_in_evaluation_a_token_does_not_see_the_others(query_norm: str) -> None:
    layer, x = small_peer(query_norm=query_norm).eval(), tokens(2, 5)
    torch.testing.assert_close(torch.stack([layer(token) for token in x.flatten(0, 1)]).view_as(x), layer(x))


def test_in_training_masked_padding_changes_nothing() -> None:
    layer, x = small_peer(), tokens(2, 5)
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])
    twin, third = copy.deepcopy(layer), copy.deepcopy(layer)
    without = twin(x[mask])
    padded = layer(x, mask)
    torch.testing.assert_close(padded[mask], without)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), msg=name)
    assert not torch.allclose(third(x)[mask], without)  # the mask is what did it


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(backend: str) -> None:
    layer = PEER(32, num_experts=64, heads=2, experts_per_head=4, key_dim=8, query_norm="layer", backend=backend)
    x = torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        weights, _ = layer.retrieve(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert weights.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer(dtype: torch.dtype) -> None:
    layer = small_peer(query_norm="none", backend="auto").to(dtype)
    twin = small_peer(query_norm="none", backend="reference").to(dtype)
    twin.load_state_dict(layer.state_dict())
    x = tokens(7).to(dtype)
    assert layer(x).dtype == dtype
    exact = copy.deepcopy(twin).double()
    weights, ids = layer.retrieve(x)
    exact_y = exact.experts(x.double(), weights.double().flatten(1), ids.flatten(1))
    assert_within_budget(layer(x), twin(x), exact_y)


def test_copies_and_saved_states_compute_the_same() -> None:
    layer, x = small_peer(gated=True), tokens(5)
    layer(x)
    layer.eval()
    loaded = small_peer(gated=True).eval()
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))


def test_repr_shows_the_settings() -> None:
    shown = repr(PEER(8, num_experts=25, heads=3, experts_per_head=2, key_dim=6, shared_keys=False))
    for part in (
        "num_experts=25",
        "heads=3",
        "experts_per_head=2",
        "key_dim=6",
        "shared_keys=False",
        "gated=False",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1000}, "num_experts is 1000, which is not a square number.* the nearest is 1024"),
        ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        ({"num_experts": -4}, "num_experts is -4; it must be at least 1"),
        ({"num_experts": 1e6}, "num_experts is 1000000.0; it must be a whole number, written without a point"),
        ({"heads": True}, "heads is True; it must be a whole number"),
        (
            {"experts_per_head": 5},
            "experts_per_head is 5, more than the 4 .*; take experts_per_head <= 4 or num_experts >= 25",
        ),
        ({"experts_per_head": 0}, "experts_per_head is 0; it must be at least 1"),
        ({"key_dim": 7}, "key_dim is 7; .* even number of at least 2"),
        ({"key_dim": 0}, "key_dim is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"query_norm": "rms"}, "query_norm is 'rms'; choose one of batch, layer, none"),
        ({"weighting": "softmx"}, "weighting is 'softmx'; choose one of softmax, sigmoid, relu, none"),
        ({"pairing": "diagonals"}, "pairing is 'diagonals'; choose one of row-major, shells"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of gelu, gelu_tanh, relu, silu, identity"),
        ({"backend": "cuda"}, "backend is 'cuda'; choose one of auto, cpu, triton, bag, reference"),
        ({"dropout": 1.0}, "dropout is 1.0; .* 0 <= dropout < 1"),
        ({"dropout": -0.1}, "dropout is -0.1; .* 0 <= dropout < 1"),
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    possible = {"dim": 8, "num_experts": 16, "experts_per_head": 2, "key_dim": 4}
    with pytest.raises(ValueError, match=message):
        PEER(**(possible | settings))


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.ones(2, 5), None, ValueError, r"x has shape \(2, 5\); its last dimension .* dim = 6"),
        (torch.tensor(1.0), None, ValueError, r"x has shape \(\); its last dimension .* dim = 6"),
        (torch.ones(2, 6).long(), None, TypeError, r"x has dtype torch.int64; .* x.float\(\)"),
        (torch.ones(2, 6), torch.ones(3).bool(), ValueError, r"mask has shape \(3,\); .* must be \(2,\)"),
    ],
    ids=["last dimension", "scalar", "integer", "mask"],
)
def test_impossible_inputs(x: Tensor, mask: Tensor | None, error: type[Exception], message: str) -> None:
    layer = small_peer()
    for call in (layer, layer.retrieve, layer.product_keys.query):
        with pytest.raises(error, match=message):
            call(x, mask)
