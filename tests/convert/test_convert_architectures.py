"""What docs/convert.md promises of each architecture: every test here is a column of its table."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from peerlm.convert import convert, unconvert
from peerlm.layers import PEER

from ..models import ARCHITECTURES, PEER_SETTINGS, batch, build, logits

CAUSAL = [name for name, (model, _, _) in ARCHITECTURES.items() if "CausalLM" in model or "LMHead" in model]
# transformers 5.23 saves weights of these two under older names, which its Trainer does not read back when it resumes:
# it goes on without them, whether the model was converted or not.
RESUMES = [name for name in ARCHITECTURES if name not in ("gpt_neox", "vit")]
COLUMNS = {
    "beside: same bits": ARCHITECTURES,
    "undo": ARCHITECTURES,
    "replace": ARCHITECTURES,
    "save and load": ARCHITECTURES,
    "generate": CAUSAL,
    "Trainer, 20 steps": ARCHITECTURES,
    "resume": RESUMES,
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


def equal_states(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train_a_little(model: PreTrainedModel) -> None:
    """One large step, so that nothing is zero any more and query statistics are no longer the first ones."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(**batch(model)).logits.square().mean().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", COLUMNS["beside: same bits"])
def test_beside_keeps_every_bit_and_learns(name: str) -> None:
    model = build(name)
    inputs = batch(model, masked=True)
    original, before = copy.deepcopy(model), logits(model, inputs)
    assert convert(model, mode="beside", **PEER_SETTINGS) is model
    assert torch.equal(bits(logits(model, inputs)), bits(before))
    peers = [module for module in model.modules() if isinstance(module, PEER)]
    assert len(peers) == 3
    model.train()
    (model(**inputs).logits * torch.randn_like(before)).sum().backward()
    for peer in peers:
        assert peer.experts.rows.grad is not None
        assert peer.experts.rows.grad[:, 1].abs().sum() > 0  # v learns, although it is zero
    model.eval()
    train_a_little(model)
    assert not torch.equal(logits(model, inputs), before)
    assert dict(original.named_parameters()).keys() < dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", COLUMNS["undo"])
def test_undo_leaves_no_trace(name: str) -> None:
    model = build(name)
    original, inputs = copy.deepcopy(model), batch(model, masked=True)
    unconvert(copy.deepcopy(convert(model, **PEER_SETTINGS)))  # a copy is its own
    assert unconvert(model) is model
    assert equal_states(model, original)
    assert model.config.to_dict() == original.config.to_dict()
    assert str(model) == str(original)
    assert torch.equal(bits(logits(model, inputs)), bits(logits(original, inputs)))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in original.modules()]


@pytest.mark.parametrize("name", COLUMNS["replace"])
def test_replaced_layers_are_gone_and_as_loud_as_they_were(name: str) -> None:
    model = build(name)
    before, inputs = sum(p.numel() for p in model.parameters()), batch(model)
    logits_before = logits(model, inputs)
    convert(model, mode="replace", **PEER_SETTINGS)
    peers = [module for module in model.modules() if isinstance(module, PEER)]
    dense = sum(p.numel() for p in model.parameters()) - sum(p.numel() for peer in peers for p in peer.parameters())
    assert dense <= before - 3 * 2 * 16 * 16
    ratio = logits(model, inputs).std() / logits_before.std()
    assert 0.5 < ratio < 2.0
    model.train()
    (model(**inputs).logits * torch.randn_like(logits_before)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for peer in peers for p in peer.parameters())


@pytest.mark.parametrize("mode", ["beside", "replace"])
@pytest.mark.parametrize("name", COLUMNS["save and load"])
@pytest.mark.usefixtures("float64")
def test_saving_and_loading(name: str, mode: str, tmp_path: Path) -> None:
    model = convert(build(name), mode=mode, layers=[0, 2], **PEER_SETTINGS)
    train_a_little(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded: Any = type(model).from_pretrained(tmp_path, output_loading_info=True)
    found, report = loaded
    assert not any(report.values()), report
    assert equal_states(model, found)
    torch.testing.assert_close(logits(found, batch(model)), logits(model, batch(model)))
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", COLUMNS["generate"])
def test_generation_with_cache_equals_generation_without(name: str) -> None:
    model = convert(build(name), **PEER_SETTINGS)
    train_a_little(model)
    ids = batch(model)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, plain)


class Examples(Dataset[dict[str, Tensor]]):
    """Counting modulo 16 from some start, every third sequence padded; or images of one brightness to be named."""

    def __init__(self, model: PreTrainedModel):
        self.images = model.main_input_name == "pixel_values"

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.images:
            return {"pixel_values": torch.full((3, 8, 8), index % 4 / 2.0 - 1.0), "labels": torch.tensor(index % 4)}
        ids, mask = (torch.arange(10) + index) % 16 + 3, torch.ones(10, dtype=torch.int64)
        mask[: 3 if index % 3 == 0 else 0] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model: PreTrainedModel, folder: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 20,
        "save_steps": 10,
        "logging_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **(settings | changes.pop("arguments", {})))
    return Trainer(model=model, args=arguments, train_dataset=Examples(model), **changes)


@pytest.mark.parametrize("name", COLUMNS["Trainer, 20 steps"])
def test_the_stock_trainer_trains(name: str, tmp_path: Path) -> None:
    model = convert(build(name), layers="middle", **PEER_SETTINGS)
    stock = trainer(model, tmp_path)
    stock.train()
    losses = [row["loss"] for row in stock.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert equal_states(model, type(model).from_pretrained(tmp_path / "checkpoint-20"))


@pytest.mark.parametrize("mode", ["beside", "replace"])
@pytest.mark.parametrize("name", COLUMNS["resume"])
def test_a_resumed_run_ends_with_the_same_weights(name: str, mode: str, tmp_path: Path) -> None:
    """From the third of four steps, within the second epoch."""
    models = [convert(build(name), mode=mode, layers="middle", **PEER_SETTINGS) for _ in range(2)]
    few = {"max_steps": 4, "save_steps": 3, "per_device_train_batch_size": 32}
    trainer(models[0], tmp_path, arguments=few).train()
    torch.nn.init.normal_(models[1].get_parameter(next(n for n, _ in models[1].named_parameters() if "rows" in n)))
    resumed = trainer(models[1], tmp_path, arguments=few)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4
    assert equal_states(*models)


def test_the_table_in_the_documents_is_of_these_tests() -> None:
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = next(row for row in rows if row[0] == "architecture")
    assert head[2:] == list(COLUMNS)
    table = {re.sub("`", "", row[1]): row[2:] for row in rows[rows.index(head) + 2 :]}
    classes = {model_class for model_class, _, _ in ARCHITECTURES.values()}
    assert table.keys() == classes
    for name, (model_class, _, _) in ARCHITECTURES.items():
        assert table[model_class] == ["yes" if name in names else "-" for names in COLUMNS.values()], model_class
