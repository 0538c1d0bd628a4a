"""What every test starts from: one thread, no network, fixed seeds, poisoned memory."""

import os

# Set before torch is imported, and inherited by processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from .interpreter import patch_once_for_each_launch

if not torch.cuda.is_available():
    # Triton asks once for all, when it is imported. Processes that tests start do without its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    import peerlm.ops.triton.kernels

    if importlib.util.find_spec("triton"):
        importlib.import_module("triton.experimental.gluon")  # or Triton does it when it first runs a kernel
        patch_once_for_each_launch()

    del os.environ["TRITON_INTERPRET"]

import peerlm.testing

from .disk import check_descriptor
from .models import Build, build

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tables",
        choices=("whole", "two-pieces", "mapped"),
        default="whole",
        help="the class of which tests make tables",
    )
    parser.addoption("--share", default="1/1", help="of the cases of every test, the first of two, say: 1/2")
    parser.addoption("--gpu-targets", default="sm_90", help="what kernels are compiled for: a target, or all")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole_tables(reason): looks at how `Table` itself keeps its rows")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as numerical what may reach the kernels, which round differently on every SIMD target.

    That is every test of a file that imports torch or compares approximately, but for those of kernels for GPUs.
    """
    part, of = map(int, config.getoption("--share").split("/"))
    cases = Counter[str]()
    for item in list(items):
        name = item.nodeid.partition("[")[0]
        if "[" in item.nodeid and cases[name] % of != part - 1:
            items.remove(item)
        cases[name] += 1
    modules = {item.module for item in items if isinstance(item, pytest.Function) and not _of_gpus(item.path)}
    numerical = {m for m in modules if hasattr(m, "torch") or "pytest.approx" in Path(m.__file__).read_text("utf-8")}
    for item in items:
        if isinstance(item, pytest.Function) and item.module in numerical:
            item.add_marker("numerical")


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: whoever looks for garbage need not look through a million objects."""
    gc.collect()
    gc.freeze()


def _of_gpus(path: Path) -> bool:
    return not {"benchmarks", "triton"}.isdisjoint(path.parent.parts[len(Path(__file__).parent.parts) :])


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("whole_tables")
    if marker is not None and item.config.getoption("--tables") != "whole":
        pytest.skip(marker.args[0])


@pytest.fixture(autouse=True, scope="session")
def tables(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--tables` every layer of a test has tables of another class, `two_pieces.py` or one in mapped files."""
    from peerlm.layers.mapped.place import RowPlace
    from peerlm.layers.mapped.table import mapped_in
    from peerlm.layers.table import tables_as

    kind = request.config.getoption("--tables")
    if kind == "whole":
        yield
        return
    with tables_as(class_of_two_pieces() if kind == "two-pieces" else mapped_in(RowPlace.for_a_while())):
        yield


@pytest.fixture
def two_pieces() -> type:
    """A class of tables whose rows lie in two pieces."""
    return class_of_two_pieces()


def class_of_two_pieces() -> type:
    if "two_pieces" not in sys.modules:
        spec = importlib.util.spec_from_file_location("two_pieces", Path(__file__).with_name("two_pieces.py"))
        sys.modules["two_pieces"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["two_pieces"])
    return sys.modules["two_pieces"].TwoPieces


# Examples share the cores with other tests, so that a slow one is no failure.
settings.register_profile("peerlm", deadline=None)
settings.load_profile("peerlm")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN or the largest integer, as deterministic mode does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """What the test builds is in float64: equal to 1e-7, on any machine, where it is equal in exact arithmetic."""
    with peerlm.testing.float64():
        yield


@pytest.fixture(autouse=True, scope="session")
def own_heap() -> Iterator[None]:
    """Commands that a test calls keep freed memory in a process of theirs; this one gives it back, as tests expect."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("peerlm.cli", "peerlm_studies.script"):
            patch.setattr(f"{module}.keep_freed_memory", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", check_descriptor)
        yield


@pytest.fixture
def new_model() -> Build:
    """A function: the name of an architecture, and settings that differ -> a new model."""
    return build


WORDS = "river lantern moss quiet copper ladder winter orchard signal paper harbour tin violet"


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A function: kind of tokenizer -> a small one of that kind, whose documents begin and end as `template` says.

    "bytes": byte-level BPE. "spaces": BPE of the characters of WORDS with "▁" before words, as sentencepiece writes
    them; with `unk` or `byte_fallback` for others, else without either. "llama": the same by a normaliser that puts
    "▁" before a text. "bert": lower-cased pieces of words.
    """
    return _make_tokenizer


def _make_tokenizer(
    kind: str = "bytes",
    *,
    template: str | None = None,
    unk: str | None = None,
    byte_fallback: bool = False,
    bos: str | None = None,
    eos: str = "</s>",
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", *([unk] if unk else [])]
    if kind == "bert":
        engine = Tokenizer(models.WordPiece(unk_token=unk))
        engine.normalizer = normalizers.BertNormalizer()
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    else:
        engine = Tokenizer(models.BPE(unk_token=unk, byte_fallback=byte_fallback))
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
        alphabet: list[str] = []
        if kind == "bytes":
            engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            engine.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        elif kind == "spaces":
            engine.pre_tokenizer = pre_tokenizers.Metaspace()
            engine.decoder = decoders.Metaspace()
        else:
            engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            engine.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        size = 330 if kind == "bytes" else 130 + len(fallback)
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*special, *fallback], initial_alphabet=alphabet, show_progress=False
        )
    engine.train_from_iterator(([WORDS] if kind != "llama" else WORDS.split()) * 3, trainer)
    if byte_fallback:  # the trainer makes tokens of text of these, which would be read as such in a text
        state = json.loads(engine.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
        engine = Tokenizer.from_str(json.dumps(state))
    if template:
        ids = [(token, engine.token_to_id(token)) for token in special]
        engine.post_processor = TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token=bos, eos_token=eos, unk_token=unk, pad_token="<pad>"
    )
