"""What a step costs: as the accounting counts it where all is trained, and less by hand where parts are frozen."""

from pathlib import Path

from peerlm.accounting import model_cost
from peerlm.continual.cost import training_flops_per_token
from peerlm.continual.method import freeze, peer_layers
from peerlm.evaluate import load_model


def test_all_weights_cost_three_forward_passes(texts: Path) -> None:
    for name in ("peer", "dense"):
        model, _ = load_model(texts / name)
        assert training_flops_per_token(model, 16) == model_cost(model, 16).training_flops_per_token


def test_frozen_weights_need_no_gradients(texts: Path) -> None:
    model, _ = load_model(texts / "peer")
    forward = model_cost(model, 16).forward_flops_per_token
    attention = 2 * (4 * 16 * 2 * 8)  # two blocks, no weights of their own: both factors get gradients
    freeze(model)
    assert training_flops_per_token(model, 16) == 2 * forward + attention
    layer = peer_layers(model)["model.layers.0.ffw"]
    layer.experts.requires_grad_(True)
    experts = 2 * 2 * 16 * 2 * 4  # two tables, width 16, 2 heads of 4 experts
    assert training_flops_per_token(model, 16) == 2 * forward + attention + experts
    layer.product_keys.sub_keys.requires_grad_(True)
    scores = 2 * 2 * 8 * 8  # 2 heads, 8 sub-keys a half, key_dim 8
    assert training_flops_per_token(model, 16) == 2 * forward + attention + experts + scores
    layer.product_keys.query_proj.weight.requires_grad_(True)
    assert training_flops_per_token(model, 16) == 2 * forward + attention + experts + scores + 2 * 16 * 16
