"""PEER's rivals against loops that follow their papers."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers import DenseFFW, ExpertChoiceMoE, FineGrainedMoE, ProductKeyMemory, TokenChoiceMoE
from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.testing import exhaustive_scores, weigh_floats

DIM = 6
RIVALS: dict[str, Any] = {
    "dense": lambda: DenseFFW(DIM),
    "swiglu": lambda: DenseFFW(DIM, activation="silu", gated=True),
    "expert_choice": lambda: ExpertChoiceMoE(DIM, num_experts=4, hidden=5, capacity_factor=1.5),
    "token_choice": lambda: TokenChoiceMoE(DIM, num_experts=4, hidden=5),
    "fine_grained_moe": lambda: FineGrainedMoE(DIM, num_experts=5, experts_per_token=3, hidden=4),
    "pkm": lambda: ProductKeyMemory(DIM, num_values=16, heads=2, values_per_head=3, key_dim=4),
    "memory plus": lambda: ProductKeyMemory(DIM, num_values=16, heads=2, values_per_head=3, key_dim=4, gated=True),
}


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def large_expert(layer: ExpertChoiceMoE | TokenChoiceMoE, expert: int, x: Tensor) -> Tensor:
    return F.gelu(x @ layer.down[expert]) @ layer.up[expert]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_shapes(rival: str, shape: tuple[int, ...]) -> None:
    layer, x = RIVALS[rival]().double(), tokens(*shape)
    assert layer(x).shape == x.shape
    assert layer(x, torch.zeros(shape, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("rival", RIVALS)
def test_gradients(rival: str) -> None:
    layer, x = RIVALS[rival]().double().eval(), tokens(4).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


LARGER: dict[str, Any] = {
    "expert_choice": lambda: ExpertChoiceMoE(32, num_experts=16, hidden=8, capacity_factor=8),
    "token_choice": lambda: TokenChoiceMoE(32, num_experts=16, hidden=8),
    "fine_grained_moe": lambda: FineGrainedMoE(32, num_experts=16, experts_per_token=6, hidden=8),
}


@pytest.mark.parametrize("rival", LARGER)
def test_gradients_have_the_same_bits_on_several_threads(rival: str) -> None:
    layer, x, threads = LARGER[rival](), torch.randn(2048, 32, requires_grad=True), torch.get_num_threads()
    torch.use_deterministic_algorithms(False)  # as outside of tests; the fixture that asked for them restores all
    torch.set_num_threads(4)
    try:
        found = [torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]) for _ in range(12)]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("rival", RIVALS)
def test_autocast_and_copies(rival: str) -> None:
    layer = RIVALS[rival]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tokens(8).float())
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    x = tokens(8).float()
    assert torch.equal(copy.deepcopy(layer).eval()(x), layer.eval()(x))


@pytest.mark.parametrize("rival", [rival for rival in RIVALS if rival != "expert_choice"])
def test_in_evaluation_a_token_does_not_see_the_others(rival: str) -> None:
    layer, x = RIVALS[rival]().double().eval(), tokens(5)
    torch.testing.assert_close(torch.stack([layer(token) for token in x]), layer(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense(activation: str) -> None:
    layer, x = DenseFFW(DIM, hidden=7, activation=activation).double(), tokens(2, 3)
    expected = ACTIVATIONS[activation](x @ layer.down_proj.weight.T) @ layer.up_proj.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_swiglu() -> None:
    layer, x = DenseFFW(DIM, activation="silu", gated=True).double(), tokens(2, 3)
    assert layer.gate_proj is not None
    hidden = (x @ layer.down_proj.weight.T) * F.silu(x @ layer.gate_proj.weight.T)
    torch.testing.assert_close(layer(x), hidden @ layer.up_proj.weight.T)


def test_dense_and_gated_defaults_have_as_many_parameters() -> None:
    dense, gated = (sum(p.numel() for p in DenseFFW(96, gated=gated).parameters()) for gated in (False, True))
    assert dense == gated == 8 * 96 * 96


@pytest.mark.parametrize("capacity_factor", [0.1, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_expert_choice_equals_loops(masked: bool, capacity_factor: float) -> None:
    layer = ExpertChoiceMoE(DIM, num_experts=4, hidden=5, capacity_factor=capacity_factor).double()
    x = tokens(10)
    mask = torch.arange(10) % 5 != 2 if masked else torch.ones(10, dtype=torch.bool)
    real = mask.nonzero().flatten().tolist()
    capacity = math.ceil(len(real) * capacity_factor / 4)
    scores = layer.router(x).softmax(dim=-1)
    expected = torch.zeros_like(x)
    for expert in range(4):
        for t in sorted(real, key=lambda t: -scores[t, expert].item())[:capacity]:
            expected[t] += scores[t, expert] * large_expert(layer, expert, x[t])
    torch.testing.assert_close(layer(x, mask if masked else None), expected)


def test_expert_choice_loads_experts_evenly_and_never_takes_padding() -> None:
    layer = ExpertChoiceMoE(DIM, num_experts=4)
    logits = torch.zeros(16, 4)
    logits[:, 0] = 200.0  # the other experts' scores underflow to 0
    mask = torch.arange(16) < 8  # torch.topk takes equal scores from the middle first
    _, chosen = layer._choose(logits, mask)
    assert chosen.shape == (4, 2)
    assert mask[chosen].all()


def test_token_choice_equals_loops() -> None:
    layer, x = TokenChoiceMoE(DIM, num_experts=5, experts_per_token=3, hidden=5).double(), tokens(7)
    expected = torch.zeros_like(x)
    for t, probabilities in enumerate(layer.router(x).softmax(dim=-1)):
        best = sorted(range(5), key=lambda e: -probabilities[e].item())[:3]
        for expert in best:
            expected[t] += probabilities[expert] / probabilities[best].sum() * large_expert(layer, expert, x[t])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_by_its_equation(masked: bool) -> None:
    layer, x = TokenChoiceMoE(DIM, num_experts=5, experts_per_token=2).double(), tokens(7)
    mask = torch.arange(7) < 4 if masked else torch.ones(7, dtype=torch.bool)
    layer(x, mask if masked else None)
    probabilities = layer.router(x[mask]).softmax(dim=-1)
    choices = probabilities.topk(2).indices.flatten().tolist()
    expected = 5 * sum(choices.count(e) / len(choices) * probabilities[:, e].mean() for e in range(5))
    torch.testing.assert_close(layer.balance_loss, expected)


def test_balance_loss_is_one_when_even_and_grows_with_unevenness() -> None:
    layer = TokenChoiceMoE(4, num_experts=4, experts_per_token=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4))
    layer(torch.eye(4))
    even = layer.balance_loss
    layer(torch.eye(4)[:1].expand(4, -1))
    torch.testing.assert_close(even, torch.tensor(1.0))
    assert layer.balance_loss > even


def test_balance_loss_trains_the_router_and_is_absent_in_evaluation() -> None:
    layer = TokenChoiceMoE(DIM, num_experts=4)
    layer(tokens(5).float())
    layer.balance_loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0
    layer.eval()(tokens(5).float())
    assert layer.balance_loss is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pairing", ["row-major", "shells"])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("key_norm", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_product_key_memory_equals_exhaustive_search(
    weighting: str, key_norm: bool, shared_keys: bool, pairing: str, backend: str
) -> None:
    layer = ProductKeyMemory(
        DIM,
        num_values=16,
        heads=2,
        values_per_head=3,
        key_dim=4,
        weighting=weighting,
        key_norm=key_norm,
        shared_keys=shared_keys,
        pairing=pairing,
        backend=backend,
    )
    layer, x = layer.double().eval(), tokens(5)
    sub_keys = layer.product_keys.sub_keys
    if key_norm:
        sub_keys = sub_keys / (3 * sub_keys.square().sum(dim=-1, keepdim=True)).sqrt()
    scores = exhaustive_scores(layer.product_keys.query(x), sub_keys, pairing)
    expected = torch.zeros_like(x)
    for t in range(5):
        for head in scores[t].tolist():
            best = sorted(range(16), key=lambda i: -head[i])[:3]
            for weight, i in zip(weigh_floats([head[i] for i in best], weighting), best, strict=True):
                expected[t] += weight * layer.values.rows[i]
    torch.testing.assert_close(layer(x), expected)
    assert set(layer.values.parameter_roles.values()) == {"table"}


def test_memory_plus_is_gated_by_the_input() -> None:
    layer, x = RIVALS["memory plus"]().double().eval(), tokens(5)
    plain = RIVALS["pkm"]().double().eval()
    plain.load_state_dict(
        {
            name: value
            for name, value in layer.state_dict().items()
            if name.split(".")[0] not in ("gate_proj", "out_proj")
        }
    )
    gate = F.silu(x @ layer.gate_proj.weight.T)
    torch.testing.assert_close(layer(x), (plain(x) * gate) @ layer.out_proj.weight.T)


def test_product_key_memory_leaves_padding_out_of_the_query_norm() -> None:
    layer, x, mask = RIVALS["pkm"]().double(), tokens(6), torch.arange(6) < 4
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x, mask)[mask], twin(x[mask]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DenseFFW(0), "dim is 0; it must be at least 1"),
        (lambda: DenseFFW(8, hidden=0), "hidden is 0; it must be at least 1"),
        (
            lambda: DenseFFW(8, activation="tanh"),
            "activation is 'tanh'; choose one of gelu, gelu_tanh, relu, silu, identity",
        ),
        (lambda: ExpertChoiceMoE(0), "dim is 0; it must be at least 1"),
        (lambda: ExpertChoiceMoE(8, num_experts=0), "num_experts is 0; it must be at least 1"),
        (lambda: ExpertChoiceMoE(8, hidden=-1), "hidden is -1; it must be at least 1"),
        (lambda: ExpertChoiceMoE(8, activation="tanh"), "activation is 'tanh'; choose one of"),
        (lambda: ExpertChoiceMoE(8, capacity_factor=0), "capacity_factor is 0; .* <= num_experts = 16"),
        (
            lambda: ExpertChoiceMoE(8, num_experts=2, capacity_factor=3),
            "capacity_factor is 3; .* <= num_experts = 2",
        ),
        (
            lambda: TokenChoiceMoE(8, experts_per_token=0),
            "experts_per_token is 0; take 1 to num_experts = 16",
        ),
        (
            lambda: TokenChoiceMoE(8, experts_per_token=17),
            "experts_per_token is 17; take 1 to num_experts = 16",
        ),
        (
            lambda: FineGrainedMoE(8, num_experts=4, experts_per_token=5),
            "experts_per_token is 5; take 1 to num_experts = 4",
        ),
        (lambda: FineGrainedMoE(8, shared_experts=-1), "shared_experts is -1; it must be at least 1"),
        (lambda: FineGrainedMoE(8, routed_scale=0.0), "routed_scale is 0.0; .* take a number above 0"),
        (lambda: FineGrainedMoE(8, balance_step=-0.1), "balance_step is -0.1; take a number of at least 0"),
        (lambda: ProductKeyMemory(8, num_values=1000), "num_values is 1000, .* the nearest is 1024"),
        (
            lambda: ProductKeyMemory(8, num_values=100),
            "values_per_head is 32, .* take values_per_head <= 10 or num_values >= 1024",
        ),
        (lambda: ProductKeyMemory(8, values_per_head=0), "values_per_head is 0; it must be at least 1"),
        (
            lambda: ProductKeyMemory(8, backend="cuda"),
            "backend is 'cuda'; choose one of auto, cpu, triton, bag",
        ),
    ],
)
def test_impossible_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("rival", RIVALS)
def test_impossible_inputs(rival: str) -> None:
    layer: nn.Module = RIVALS[rival]()
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); its last dimension must be the layer's dim = 6"):
        layer(torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"x has dtype torch.int64; pass floating-point"):
        layer(torch.ones(2, 6).long())
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\); for this x it must be \(2,\)"):
        layer(torch.ones(2, 6), torch.ones(2, 6).bool())
