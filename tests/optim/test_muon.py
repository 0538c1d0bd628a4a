"""Muon on matrices equals torch's own; all else stays with AdamW."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peerlm.layers import FineGrainedMoE
from peerlm.layers.output_gate import OutputGate
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.optim import RowAdamW, clip_gradients, parameter_groups, set_learning_rates
from peerlm.optim.saved import load_state, save_state


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4, bias=False))


def give_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(module, step)
        set_learning_rates(optimizer.param_groups, 0.02 / (1 + step), progress=0.0)
        optimizer.step()


def test_steps_have_the_bits_of_torch_muon_and_adamw() -> None:
    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    optimizer = RowAdamW(parameter_groups(ours, weight_decay=0.1, muon=True), betas=(0.9, 0.98))
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    bias = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    others = [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(bias, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    take_steps(ours, optimizer, range(4))
    for step in range(4):
        give_gradients(theirs, step)
        for other in others:
            other.param_groups[0]["lr"] = 0.02 / (1 + step)
            other.step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_each_matrix_of_a_stack_is_on_its_own() -> None:
    stack, single = (nn.ParameterList([torch.ones(3, 4, 5)]), nn.ParameterList([torch.ones(4, 5) for _ in range(3)]))
    optimizers = [RowAdamW(parameter_groups(module, muon=True)) for module in (stack, single)]
    gradients = torch.randn(3, 4, 5)
    stack[0].grad = gradients
    for parameter, gradient in zip(single, gradients, strict=True):
        parameter.grad = gradient
    for optimizer in optimizers:
        set_learning_rates(optimizer.param_groups, 0.1, progress=0.0)
        optimizer.step()
    assert torch.equal(stack[0], torch.stack(list(single)))
    assert (stack[0] != 1).all()


def test_an_update_has_the_size_of_adamw() -> None:
    layer = nn.Linear(64, 96, bias=False)
    before = layer.weight.detach().clone()
    optimizer = RowAdamW(parameter_groups(layer, muon=True))
    layer.weight.grad = torch.randn(96, 64)
    set_learning_rates(optimizer.param_groups, 0.1, progress=0.0)
    optimizer.step()
    assert (layer.weight - before).square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)


def test_which_weights_it_takes() -> None:
    config = PeerConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffw_layers="fine_grained_moe+pkm",
        fine_grained_moe={"num_experts": 4, "experts_per_token": 2},
        pkm={"num_values": 16, "heads": 1, "values_per_head": 2, "key_dim": 4},
        ffw_output_gate="token",
        tie_word_embeddings=False,
    )
    model = PeerForCausalLM(config)
    of: dict[str, set[int]] = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(model, muon=True)}
    assert set(of) == {"matrix", "muon", "vector", "table", "keys"}
    (gate,) = (module for module in model.modules() if isinstance(module, OutputGate))
    assert of["matrix"] == {id(model.lm_head.weight), id(gate.weight)}
    (moe,) = (module for module in model.modules() if isinstance(module, FineGrainedMoE))
    assert {id(moe.down), id(moe.up), id(moe.router.score.weight)} < of["muon"]
    plain = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model)}
    assert plain["matrix"] == of["matrix"] | of["muon"]


def test_a_loaded_state_continues_with_the_same_bits(tmp_path: Path) -> None:
    whole = mlp()
    begun = copy.deepcopy(whole)
    take_steps(whole, RowAdamW(parameter_groups(whole, muon=True)), range(5))
    first = RowAdamW(parameter_groups(begun, muon=True))
    take_steps(begun, first, range(3))
    save_state(first, tmp_path, begun)
    second = RowAdamW(parameter_groups(begun, muon=True))
    load_state(second, tmp_path)
    take_steps(begun, second, range(3, 5))
    for found, expected in zip(begun.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_clipping_scales_its_gradients_with_the_rest() -> None:
    module = mlp()
    groups = parameter_groups(module, muon=True)
    give_gradients(module, 0)
    before: list[Tensor] = [parameter.grad.clone() for parameter in module.parameters()]
    norm = torch.cat([each.flatten() for each in before]).norm()
    norms = clip_gradients(groups, max_norm=0.5, table_max_norm=1.0)
    assert norms.rest == pytest.approx(norm.item())
    for parameter, each in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, each * 0.5 / norm)


def test_what_it_cannot_train_is_refused() -> None:
    vector = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"Muon takes matrices and stacks of them, not a parameter \(3,\)"):
        RowAdamW([{"params": [vector], "name": "muon"}])
    matrix = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"momentum = 1\.0 is out of range"):
        RowAdamW([{"params": [matrix], "name": "muon", "momentum": 1.0}])
