"""A folder that holds PEER never opens as the bare base: transformers refuses it, or opens it with its own code."""

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peerlm.convert import convert, unconvert
from peerlm.custom_code import CODE
from peerlm.growth import grow
from peerlm.hf import PeerAdapterConfig
from peerlm.layers import PEER
from peerlm.packs.api import new_pack, save_pack

from . import fresh
from .models import PEER_SETTINGS, batch, build, contents, logits

OLD = Path(__file__).parent / "convert" / "saved"
KINDS = ("beside", "replaced", "neurons", "converted_peer", "own", "int8", "grown", "copied", "pickled", "inner")
REFUSED_BY_NAME = ("beside", "replaced", "neurons", "grown", "copied", "pickled", "inner")


def awake(model: PreTrainedModel) -> PreTrainedModel:
    """The model with PEER layers that change its output."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, PEER):
            module.experts.write(torch.randn(module.experts.up.shape, generator=generator), vector=1)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """A model of each kind."""
    beside = awake(convert(build("llama"), layers=0, **PEER_SETTINGS))
    samples = [{"input_ids": batch(beside)["input_ids"]}]
    int8 = build("peer", ffw_layers="peer", peer=PEER_SETTINGS)
    for module in int8.modules():
        if isinstance(module, PEER):
            module.experts.convert_rows("int8")
    int8.config.peer = {**PEER_SETTINGS, "row_format": "int8"}
    grown = awake(convert(build("llama"), layers=1, pairing="shells", **PEER_SETTINGS))
    grow(grown, num_experts=100)
    return {
        "beside": beside,
        "replaced": convert(build("llama"), mode="replace", layers=0, **PEER_SETTINGS),
        "neurons": convert(
            build("llama"), mode="replace", init="neurons", samples=samples, fit={"steps": 1}, share=0.5
        ),
        "converted_peer": awake(convert(build("peer"), layers=0, **PEER_SETTINGS)),
        "own": build("peer", ffw_layers="peer", peer=PEER_SETTINGS),
        "int8": int8,
        "grown": grown.eval(),
        "copied": copy.deepcopy(beside),
        "pickled": pickle.loads(pickle.dumps(beside)),
        "inner": beside.model,
    }


@pytest.fixture(scope="module")
def folder(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of the models in a folder, besides the base, adapters and a pack."""
    folder = tmp_path_factory.mktemp("folders")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    base = build("llama")
    base.save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    config = PeerAdapterConfig(**PEER_SETTINGS, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a deprecated name
        get_peft_model(base, config).save_pretrained(folder / "adapter")
    with_pack = copy.deepcopy(models["own"])
    new_pack(with_pack, "facts", num_experts=16)
    save_pack(with_pack, "facts", folder / "pack")
    with_pack.save_pretrained(folder / "had_a_pack")
    return folder


def python(code: str, folder: Path) -> str:
    """What a process prints that has not imported peerlm."""
    outcome = fresh.python(code, folder)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


OPEN_WITHOUT = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peerlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name="peerlm")
sys.meta_path.insert(0, Absent())
import transformers
from transformers import AutoModelForCausalLM, AutoModel, AutoTokenizer, LlamaForCausalLM, pipeline
def tried(call):
    try:
        return "opened as " + type(call()).__name__
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
said = {}
for name in NAMES:
    said[name] = [
        tried(lambda: AutoModelForCausalLM.from_pretrained(name)),
        tried(lambda: AutoModel.from_pretrained(name)),
        tried(lambda: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)),
        tried(lambda: LlamaForCausalLM.from_pretrained(name)),
        tried(lambda: pipeline("text-generation", name)),
    ]
print()  # after transformers' questions
print(json.dumps(said))
"""


@pytest.mark.slow
def test_without_peerlm_no_folder_opens_and_each_says_why(folder: Path) -> None:
    names = (*KINDS, "had_a_pack", "adapter", "pack", "base")
    said = json.loads(python(OPEN_WITHOUT.replace("NAMES", repr(names)), folder).splitlines()[-1])
    assert said.pop("base")[0] == "opened as LlamaForCausalLM"
    for name, answers in said.items():
        assert not any("opened" in answer for answer in answers), (name, answers)
    for name in (*KINDS, "had_a_pack"):
        auto, headless, trusting, named, pipe = said[name]
        for refused in (auto, headless, pipe):
            assert "trust_remote_code=True" in refused, name
        assert trusting.startswith("ImportError: this model has PEER experts"), (name, trusting)
        assert trusting.count("\n") == 0
        assert trusting.endswith("install peerlm")
        assert 'install peerlm, and "import peerlm" first' in named, (name, named)
    assert said["adapter"][0] == """KeyError: 'PEER_ADAPTER of peerlm: install it, and "import peerlm" first'"""


OPEN_TRUSTING = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
assert "peerlm" not in sys.modules
config = AutoConfig.from_pretrained(NAMES[0], trust_remote_code=True)
print(type(config).__name__, config.model_type, hasattr(config, "auto_map"))
for name in NAMES:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(torch.load("ids.pt")).logits, name + ".logits")
    model.save_pretrained(name + "_again")
"""


@pytest.mark.slow
def test_with_trust_remote_code_nobody_needs_to_import_peerlm(models: dict[str, PreTrainedModel], folder: Path) -> None:
    names = ("beside", "neurons", "own", "int8", "grown", "converted_peer")
    ids = batch(models["beside"])["input_ids"]
    torch.save(ids, folder / "ids.pt")
    assert python(OPEN_TRUSTING.replace("NAMES", repr(names)), folder).split() == ["LlamaConfig", "llama", "False"]
    for name in names:
        assert torch.equal(torch.load(folder / f"{name}.logits"), logits(models[name], {"input_ids": ids})), name
        assert contents(folder / f"{name}_again") == contents(folder / name), name


@pytest.mark.parametrize("name", [name for name in KINDS if name != "inner"])
def test_once_peerlm_is_imported_a_model_has_its_own_type_and_its_bits(
    name: str, models: dict[str, PreTrainedModel], folder: Path
) -> None:
    own = "peer" if name in ("own", "int8", "converted_peer") else "llama"
    saved = json.loads((folder / name / "config.json").read_text())
    assert saved["model_type"] == ("peer" if name in ("own", "int8") else f"peerlm_{own}")
    assert saved["auto_map"]["AutoConfig"].partition(".")[0] + ".py" == CODE
    loaded = AutoModelForCausalLM.from_pretrained(folder / name)
    assert (type(loaded), loaded.config.model_type) == (type(models[name]), own)
    assert type(AutoConfig.from_pretrained(folder / name)) is type(models[name].config)
    assert not {"auto_map", "transformers_weights"} & vars(loaded.config).keys()
    assert torch.equal(logits(loaded, batch(loaded)), logits(models[name], batch(loaded)))


def test_an_inner_model_opens_with_its_experts(models: dict[str, PreTrainedModel], folder: Path) -> None:
    loaded, ids = AutoModel.from_pretrained(folder / "inner"), batch(models["beside"])["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, models["inner"](ids).last_hidden_state)


def test_a_class_that_is_named_opens_without_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "beside")
    assert any(isinstance(module, PEER) for module in model.modules())
    assert "model of type" not in caplog.text


def test_a_configuration_alone_is_marked(models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    models["beside"].config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "peerlm_llama"
    assert (tmp_path / CODE).is_file()
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig


def test_nothing_of_it_is_left_after_undo(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "beside")
    unconvert(model).save_pretrained(tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(folder / "base")


def test_folders_of_earlier_versions_open(models: dict[str, PreTrainedModel], folder: Path, tmp_path: Path) -> None:
    assert any(isinstance(module, PEER) for module in AutoModelForCausalLM.from_pretrained(OLD).modules())
    shutil.copytree(folder / "beside", tmp_path / "second")
    path = tmp_path / "second" / "config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]
    (tmp_path / "second" / CODE).unlink()
    path.write_text(json.dumps(config | {"model_type": "llama"}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(loaded, batch(loaded)), logits(models["beside"], batch(loaded)))


def test_a_model_with_code_of_its_own_keeps_it(tmp_path: Path) -> None:
    config = LlamaConfig(auto_map={"AutoConfig": "theirs.Config"})
    config.save_pretrained(tmp_path / "plain")
    before = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert before["auto_map"] == {"AutoConfig": "theirs.Config"}
    model = build("llama")
    model.config.auto_map = {"AutoConfig": "theirs.Config"}
    convert(model, layers=0, **PEER_SETTINGS).save_pretrained(tmp_path / "converted")
    saved = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert saved["auto_map"]["AutoConfig"].endswith("PeerlmConfig")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "converted").config.auto_map == {"AutoConfig": "theirs.Config"}
