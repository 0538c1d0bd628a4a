"""The stock transformers.Trainer trains the model, saves it, and resumes."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peerlm.model import PeerConfig, PeerForCausalLM


class Cycles(Dataset[dict[str, torch.Tensor]]):
    """Counting modulo the vocabulary from a random start, easy to learn; every third sequence is padded."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = np.random.default_rng(index).integers(16)
        input_ids = (torch.arange(12) + start) % 16
        mask = torch.ones(12, dtype=torch.int64)
        if index % 3 == 0:
            mask[:4] = 0
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": input_ids.masked_fill(mask == 0, -100),
        }


def trainer(folder: Path, *, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    peer = {"num_experts": 64, "heads": 2, "experts_per_head": 2, "key_dim": 8}
    config = PeerConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, peer=peer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=40,
        save_steps=20,
        logging_steps=5,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=PeerForCausalLM(config), args=arguments, train_dataset=Cycles())


def test_loss_falls_and_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    resumed = trainer(tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert resumed.state.global_step == 40
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert any(name.endswith("running_mean") for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    saved = PeerForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    assert all(torch.equal(expected[name], value) for name, value in saved.state_dict().items())


@pytest.mark.usefixtures("float64")
def test_label_smoothing_trains_the_next_token(tiny_model: Callable[..., PeerForCausalLM], tmp_path: Path) -> None:
    model, ids = tiny_model().eval(), torch.randint(1, 64, (2, 9))
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-12, report_to="none", use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_balance_loss_of_accumulated_micro_batches_is_their_mean(
    tiny_model: Callable[..., PeerForCausalLM], tmp_path: Path, micro_batches: int
) -> None:
    model = tiny_model(ffw_layers="token_choice", balance_loss_coefficient=1.0)
    rows = [Cycles()[index] for index in range(8)]
    expected = 0.0
    predicted = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    size = len(rows) // micro_batches
    for start in range(0, len(rows), size):
        batch = {name: torch.stack([row[name] for row in rows[start : start + size]]) for name in rows[0]}
        share = int((batch["labels"][:, 1:] != -100).sum()) / predicted
        expected += share * copy.deepcopy(model)(**batch).loss.item()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected)
