"""Layers whose tables RowAdamW trains, under torch.compile: reading and updating rows stay outside its graphs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peerlm import PEER, PeerConfig, PeerForCausalLM, ProductKeyMemory
from peerlm.optim import RowAdamW, parameter_groups

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # torch.compile warns of what it does

MODES: dict[str, dict[str, Any]] = {"exact": {}, "lazy": {"lazy": True}, "fused": {"fused": True}}
SIZES = {"heads": 2, "key_dim": 8}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "peer": lambda: PEER(16, num_experts=256, experts_per_head=2, **SIZES),
    "memory": lambda: ProductKeyMemory(16, num_values=256, values_per_head=2, **SIZES),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    environment = dict(os.environ)
    yield
    for name in os.environ.keys() - environment.keys():  # TrainingArguments asks accelerate to compile for good
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


def trained(layer: str, mode: str, compiled: bool, steps: int = 6) -> tuple[nn.Module, list[Tensor]]:
    """The layer after some steps, in which rows fall behind and catch up, and each step's loss."""
    torch.manual_seed(0)
    module, inputs = LAYERS[layer](), torch.randn(steps, 9, 16)
    optimizer = RowAdamW(parameter_groups(module), lr=0.01, **MODES[mode])
    run = torch.compile(module, backend="aot_eager") if compiled else module
    losses = []
    for x in inputs:
        optimizer.zero_grad()
        loss = (run(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return module.eval(), losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_compiled_training_has_the_bits_of_eager_training(layer: str, mode: str) -> None:
    """Without the compiler's own kernels, whose rounding is another."""
    expected, losses = trained(layer, mode, compiled=False)
    found, compiled_losses = trained(layer, mode, compiled=True)
    assert torch.equal(torch.stack(compiled_losses), torch.stack(losses))
    for (name, value), right in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, right), name


def test_one_graph_for_a_table_that_it_trains_is_refused_in_a_sentence() -> None:
    module = LAYERS["peer"]()
    optimizer = RowAdamW(parameter_groups(module), lr=0.01)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RowAdamW brings rows up to date"):
        torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(3, 16))
    del optimizer


class Cycles(Dataset[dict[str, Tensor]]):
    """Counting modulo the vocabulary from a random start."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = (torch.arange(12) + 7 * index) % 16
        return {"input_ids": input_ids, "labels": input_ids}


@pytest.mark.usefixtures("float64")
def test_trainer_compiles_a_model_that_it_trains(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        peer = {"num_experts": 64, "experts_per_head": 2, **SIZES}
        model = PeerForCausalLM(
            PeerConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, peer=peer)
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            logging_steps=1,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )
        optimizer = RowAdamW(parameter_groups(model), lr=0.01)
        trainer = Trainer(model=model, args=arguments, train_dataset=Cycles(), optimizers=(optimizer, None))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0])
