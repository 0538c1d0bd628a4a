"""`import peerlm` alone lets transformers and peft open what they are given, whichever import comes first."""

import warnings
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peerlm.convert.folder import convert_folder
from peerlm.hf import PeerAdapterConfig, PeerConfig, PeerForCausalLM

from .fresh import python

PEER = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 4}
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPEN_ALL = """
print(type(transformers.AutoConfig.from_pretrained("own")).__name__)
print(type(transformers.AutoModel.from_pretrained("own")).__name__)
print(type(transformers.AutoModelForCausalLM.from_pretrained("own")).__name__)
converted = transformers.LlamaForCausalLM.from_pretrained("converted")
print(sum("experts" in name for name, _ in converted.named_parameters()))
print(type(peft.AutoPeftModelForCausalLM.from_pretrained("adapter").base_model).__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours, one of transformers, the same converted, and an adapter for it."""
    folder = tmp_path_factory.mktemp("registration")
    PeerForCausalLM(PeerConfig(**SIZES, peer=PEER)).save_pretrained(folder / "own")
    LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24)).save_pretrained(folder / "base")
    convert_folder(folder / "base", folder / "converted", settings=PEER)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    config = PeerAdapterConfig(**PEER, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a deprecated name
        get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import peerlm, transformers, peft",
        "import transformers, peft, peerlm",
        "import transformers.models.auto.modeling_auto as _, transformers.quantizers as _, peft, peerlm, transformers",
        "import peerlm; from transformers.models.llama import modeling_llama; import transformers, peft",
        "import peerlm.hf, transformers, peft",
    ],
)
def test_everything_opens_after_import_peerlm(imports: str, folder: Path) -> None:
    outcome = python(imports + OPEN_ALL, folder)
    expected = ["PeerConfig", "PeerModel", "PeerForCausalLM", "2", "PeerAdapterModel"]
    assert outcome.stdout.split() == expected, outcome.stderr


def test_tables_of_names_hold_ours_before_our_classes_are_loaded(folder: Path) -> None:
    code = """
import sys, peerlm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
print("peer" in CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["peer"], MODEL_MAPPING_NAMES["peer"])
print("peerlm.model" in sys.modules)
print(CONFIG_MAPPING["peer"].__name__, hasattr(sys.modules["transformers.models.peer"], "__file__"))
"""
    outcome = python(code, folder)
    expected = "True PeerForCausalLM PeerModel False PeerConfig False"
    assert outcome.stdout.split() == expected.split(), outcome.stderr


def test_transformers_alone_refuses_a_converted_folder_and_says_why(folder: Path) -> None:
    outcome = python("import transformers; transformers.LlamaForCausalLM.from_pretrained('converted')", folder)
    assert outcome.returncode == 1
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.endswith('transformers alone does not know: install peerlm, and "import peerlm" first')


def test_a_peft_that_does_not_take_our_adapters_is_imported_with_a_warning(folder: Path) -> None:
    code = "import sys; sys.modules['peerlm.adapters.config'] = None; import peerlm, peft; print(peft.LoraConfig())"
    outcome = python(code, folder)
    assert "LoraConfig(" in outcome.stdout
    assert "peerlm cannot add its adapters to peft 0.21" in outcome.stderr
