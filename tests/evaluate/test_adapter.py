"""A folder of an adapter is opened with its base, or says what it lacks."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from peerlm.cli import main
from peerlm.errors import UserError
from peerlm.evaluate import load_model
from peerlm.evaluate.adapter import CONFIG, WEIGHTS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter(tmp_path: Path, saved: Path) -> Path:
    """LoRA that is not zero, beside the model of `saved`."""
    model, _ = load_model(saved)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_is_read_with_its_base(adapter: Path, saved: Path) -> None:
    base, _ = load_model(saved)
    loaded, tokenizer = load_model(adapter)
    ids = torch.tensor([tokenizer("The old keeper").input_ids])
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, base(ids).logits)
        expected = peft.PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    assert not loaded.training
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "lora" in name)


def change(adapter: Path, **values: object) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | values))


def test_an_adapter_without_its_base_says_where_to_write_it(adapter: Path) -> None:
    for base in (None, "somebody/model"):
        change(adapter, base_model_name_or_path=base)
        with pytest.raises(UserError, match="which is no folder here: write its folder as base_model_name_or_path"):
            load_model(adapter)
    (adapter / CONFIG).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_model(adapter)


def test_an_adapter_without_weights_or_of_another_model_is_refused(adapter: Path, saved: Path) -> None:
    change(adapter, r=3)
    with pytest.raises(UserError, match="does not fit the model: "):
        load_model(adapter)
    change(adapter, r=2, target_modules=["k_proj"])
    with warnings.catch_warnings(), pytest.raises(UserError, match="does not fit the model: Found missing adapter"):
        load_model(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match="save the adapter again, with safetensors"):
        load_model(adapter)


def test_where_a_model_is_changed_the_base_is_to_be_named(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(adapter), str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "is an adapter, and a model is needed here: name its base, " in capsys.readouterr().err
