"""What a layer had before it grew is frozen, bit for bit, while the rest learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerlm.growth import grow, set_opening
from peerlm.growth.freezing import PARTS, freeze_grown
from peerlm.layers import PEER, ProductKeyMemory
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.optim import RowAdamW, parameter_groups

DIM = 8
OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(parameter_groups(model), lr=0.05),
    "RowAdamW": lambda model: RowAdamW(parameter_groups(model), lr=0.05),
    "SGD": lambda model: torch.optim.SGD(parameter_groups(model), lr=0.05, momentum=0.9),
    "lazy": lambda model: RowAdamW(parameter_groups(model), lr=0.05, lazy=True),
}


def small(kind: str, **changes: Any) -> nn.Module:
    shared = {"heads": 2, "key_dim": 6, "pairing": "shells", **changes}
    if kind == "peer":
        return PEER(DIM, num_experts=16, experts_per_head=3, **shared)
    return ProductKeyMemory(DIM, num_values=16, values_per_head=3, **shared)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    model.train()
    for _ in range(steps):
        x = torch.randn(40, DIM)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    model.eval()


def parts_of(layer: nn.Module) -> dict[str, list[Tensor]]:
    table = layer.experts.rows if isinstance(layer, PEER) else layer.values.rows
    keys = layer.product_keys
    parts = {
        "rows": [table[:16]],
        "keys": [keys.sub_keys[:, :, :4]],
        "query": [*keys.query_proj.parameters(), *keys.query_norm.parameters(), *keys.query_norm.buffers()],
        "new rows": [table[16:]],
        "new keys": [keys.sub_keys[:, :, 4:]],
    }
    return {name: [part.detach().clone() for part in each] for name, each in parts.items()}


def moved(before: dict[str, list[Tensor]], layer: nn.Module) -> set[str]:
    after = parts_of(layer)
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("what", [PARTS, ("rows",), ("keys",), ("query",), ("rows", "keys"), ()])
@pytest.mark.parametrize("kind", ["peer", "pkm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_frozen_keeps_its_bits(optimizer: str, kind: str, what: tuple[str, ...], trained: bool) -> None:
    torch.manual_seed(0)
    layer = small(kind)
    trains = OPTIMIZERS[optimizer](layer)
    if trained:
        train(layer, trains)  # momentum would move what gets no gradient
    grow(layer, 49, optimizer=trains)
    set_opening(layer, 0.7)
    frozen = freeze_grown(layer, what, optimizer=trains)
    before = parts_of(layer)
    train(layer, trains)
    assert moved(before, layer) == set(before) - set(what)
    frozen.remove()
    before = parts_of(layer)
    train(layer, trains)
    assert moved(before, layer) == set(before)


def test_the_rest_of_a_model_is_held_too() -> None:
    config = PeerConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        peer={"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": "shells"},
    )
    model = PeerForCausalLM(config)
    grow(model, 36)
    set_opening(model, 1)
    ids = torch.randint(32, (2, 12))
    with freeze_grown(model, before=16):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = RowAdamW(parameter_groups(model), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"model.layers.1.ffw.experts.rows", "model.layers.1.ffw.product_keys.sub_keys"}
        name = "model.layers.1.ffw.experts.rows"
        assert torch.equal(before[name][:16], after[name][:16])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_batch_norm_computes_in_training_what_it_computes_in_evaluation() -> None:
    layer = small("peer")
    train(layer, OPTIMIZERS["AdamW"](layer))
    grow(layer, 49)
    x = torch.randn(20, DIM)
    with freeze_grown(layer, ["query"]):
        expected = layer.eval()(x)
        assert torch.equal(layer.train()(x), expected)
    assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("what", "before", "message"),
    [
        (["row"], 16, "what has 'row'; choose of rows, keys, query, rest"),
        (["rows"], None, "the layer does not say how many experts it had before it grew; give before="),
        (["rows"], 17, "before is 17; give a square number up to the 49 of the layer"),
        (["rows"], 64, "before is 64; give a square number up to the 49 of the layer"),
        (["rows"], 0, "before is 0; give a square number"),
    ],
)
def test_what_cannot_be_frozen_is_refused(what: list[str], before: int | None, message: str) -> None:
    layer = set_opening(grow(small("peer"), 49), 1)
    with pytest.raises(ValueError, match=message):
        freeze_grown(layer, what, before=before)


def test_rows_that_change_in_the_backward_pass_are_not_frozen_in_vain() -> None:
    layer = grow(small("peer", row_format="int8"), 49)
    layer.experts.train_in_place()
    with pytest.raises(ValueError, match="rows in int8 are updated in the backward pass, frozen or not"):
        freeze_grown(layer, ["rows"])
    freeze_grown(layer, ["keys"]).remove()
    layer = grow(small("peer"), 49)
    with freeze_grown(layer, ["rows"]), pytest.raises(ValueError, match=r"fused=True .* use fused=False"):
        RowAdamW(parameter_groups(layer), lr=0.05, fused=True)
    RowAdamW(parameter_groups(layer), lr=0.05, fused=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight_decay": 0.1},
            "weight_decay is 0.1 for a table or sub-keys, and would move what is frozen; set it to 0",
        ),
        ({"fused": True}, r"RowAdamW\(fused=True\) updates rows in the backward pass, frozen or not; take fused=False"),
    ],
)
def test_an_optimizer_that_would_move_what_is_held_is_refused(options: dict[str, Any], message: str) -> None:
    layer = grow(small("peer"), 49)
    groups = [
        {"params": layer.experts.row_parameters(), "rows": True},
        {"params": [parameter for name, parameter in layer.named_parameters() if not name.startswith("experts")]},
    ]
    optimizer = RowAdamW(groups, **{"weight_decay": 0.0, **options})
    with pytest.raises(ValueError, match=message):
        freeze_grown(layer, optimizer=optimizer)
    train(layer, optimizer, steps=1)
    assert all(parameter.requires_grad for parameter in layer.parameters())
