"""Runs of models with options: layers beside each other, narrow experts, shared tables, and growth of these."""

import math

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peerlm.data import TokenShards
from peerlm.optim import RowAdamW
from peerlm.ranks import Ranks
from peerlm.train import train
from peerlm.train.build import build_model, build_optimizer

OPTIONS = {
    "ffw_layers": "peer+dense",
    "parallel_intermediate_size": 8,
    "ffw_init_scale": {"dense": 3.0, "peer": 1.0},
    "peer": {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 8, "row_dim": 4},
    "share_tables": True,
    "qk_norm": True,
    "kv_shift": True,
    "attention_sink": True,
    "ffw_output_gate": "token",
}


def test_a_run_with_all_options_grows_and_is_read_again(configure) -> None:
    grow = {"at": "6@50%", "opening": 0.2}
    result = train(configure(model=OPTIONS, grow=grow, budget={"steps": 4}, optim={"tables": "exact"}), progress=False)
    folder = result.run / "model"
    assert ModelCard.load(folder / "README.md").data.tags == ["peerlm", "peer", "dense"]
    rows = [value.shape for name, value in load_file(folder / "model.safetensors").items() if name.endswith("rows")]
    assert rows == [(36, 2, 4)]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {name: getattr(model.config, name) for name in OPTIONS if name not in ("peer", "ffw_layers")} == {
        name: value for name, value in OPTIONS.items() if name not in ("peer", "ffw_layers")
    }
    assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_rows_that_layers_look_up_in_one_table_count_together(configure) -> None:
    tokens = configure().data.batch_size * configure().data.context
    n = math.isqrt(tokens)
    assert n * n == tokens  # 4 retrieved rows of each token are 4 for each row
    kinds = {}
    for shared in (False, True):
        peer = {"num_experts": n * n, "heads": 2, "experts_per_head": 2, "key_dim": 8}
        config = configure(model={"ffw_layers": "peer", "peer": peer, "share_tables": shared})
        ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
        model = build_model(config, TokenShards(config.data.folder, "train"), ranks.device)
        kinds[shared] = isinstance(build_optimizer(model, config, ranks), RowAdamW)
    assert kinds == {False: True, True: False}
