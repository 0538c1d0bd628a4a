"""TRL, Accelerate and peft train a converted model and save it; its tokenizer and chat templates stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peerlm.layers import PEER

from ..models import PEER_SETTINGS, build, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and TRL call transformers by deprecated names
CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
CHAT = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "the ship"}]
SETTINGS = [f"--set={name}={value}" for name, value in PEER_SETTINGS.items()]


@pytest.fixture(scope="module")
def folder(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a chat template, a second template and a licence, and the same converted."""
    folder = tmp_path_factory.mktemp("trainers")
    tokenizer = make_tokenizer(bos="<s>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ messages[0]['content'] }}"}
    build("llama", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "LICENSE").write_text("Apache-2.0")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n\n# Base\n")
    assert run("convert", folder / "base", folder / "converted", "--layers=0", *SETTINGS) == 0
    return folder


@pytest.fixture
def converted(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "converted")


def peer_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if ".peer." in name}


def test_tokenizer_templates_and_licence_are_those_of_the_base(folder: Path) -> None:
    for path in (folder / "base").rglob("*"):
        name = path.relative_to(folder / "base")
        if path.is_file() and path.name not in ("config.json", "model.safetensors", "README.md"):
            assert (folder / "converted" / name).read_bytes() == path.read_bytes(), name
    assert (folder / "converted" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert "license: apache-2.0" in (folder / "converted" / "README.md").read_text()
    both = [AutoTokenizer.from_pretrained(folder / name) for name in ("base", "converted")]
    rendered = [tokenizer.apply_chat_template(CHAT, tokenize=False) for tokenizer in both]
    assert rendered[0] == rendered[1]


def test_sft_trainer_trains_chats_and_saves_a_folder_that_opens(folder: Path, converted: Any, tmp_path: Path) -> None:
    before = peer_weights(converted)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "converted")
    tokenizer.pad_token = "<pad>"
    arguments = SFTConfig(
        output_dir=str(tmp_path / "sft"),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=32,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = SFTTrainer(
        converted, arguments, train_dataset=Dataset.from_list([{"messages": CHAT}] * 4), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    after = peer_weights(converted)
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "peerlm_llama"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, after[name]) for name, value in peer_weights(loaded).items())
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_accelerate_trains_and_saves_it(converted: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(converted, torch.optim.AdamW(converted.parameters(), lr=1e-2))
    ids = torch.arange(3, 13)[None]
    before = peer_weights(converted)
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    whole = accelerator.unwrap_model(model)
    whole.save_pretrained(tmp_path, save_function=accelerator.save, state_dict=accelerator.get_state_dict(model))
    loaded = peer_weights(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(value, peer_weights(converted)[name]) for name, value in loaded.items())
    assert any(not torch.equal(value, before[name]) for name, value in loaded.items())


def test_lora_finds_its_targets_and_merges_into_a_folder_with_experts(converted: Any, tmp_path: Path) -> None:
    ids = torch.arange(3, 13)[None]
    adapted = get_peft_model(converted, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    adapted.save_pretrained(str(tmp_path / "lora"))
    assert any("q_proj.lora_A" in name for name, _ in adapted.named_parameters())
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    merged: Any = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert any(isinstance(module, PEER) for module in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    # The adapter names the converted folder as its base, and opens on it.
    base = AutoModelForCausalLM.from_pretrained(adapted.peft_config["default"].base_model_name_or_path)
    again = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
