"""Packs, adapters and libraries are loaded, used and unloaded while other requests run, each by its own rows alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peerlm.adapters.library import AdapterLibrary
from peerlm.errors import UserError
from peerlm.layers.mapped.cached import cache_tables
from peerlm.packs import api as packs
from peerlm.packs.api import choose_packs, load_pack, new_pack, pack_parameters, save_pack, unload_pack
from peerlm.serve import Engine, InUse
from peerlm.serve.additions import Additions, Choice

from .conftest import Gate, alone, greedy, make, tokens_of

New = Callable[..., Engine]
PROMPTS = [(5, 9, 4), (7,), (30, 31, 32, 33, 34, 35)]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pack(folder: Path, seed: int) -> Path:
    """A pack that changes what is written."""
    model = make("peer")
    new_pack(model, "new", 16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pack_parameters(model, "new"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=2)
    save_pack(model, "new", folder)
    return folder


def lora(folder: Path, seed: int, targets: tuple[str, ...] = ("q_proj", "up_proj"), kind: str = "llama") -> Path:
    """An adapter that changes what is written."""
    torch.manual_seed(seed)
    model = get_peft_model(make(kind), LoraConfig(r=2, lora_alpha=6, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def spoil(folder: Path) -> None:
    """Let the first number of an adapter be no finite one."""
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, folder / "adapter_model.safetensors")


def library_of(folder: Path, model: PreTrainedModel, *adapters: Path) -> AdapterLibrary:
    """A library whose adapters are those of the prompts."""
    library = AdapterLibrary(model, folder, top_k=1)
    for adapter, prompt in zip(adapters, PROMPTS, strict=True):
        library.add(adapter, texts=[torch.tensor(prompt)])
    return library


def merged(*folders: Path) -> PreTrainedModel:
    """The model with the terms of adapters in its weights."""
    model = make("llama")
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, down in tensors.items():
            if ".lora_A." in key:
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                with torch.no_grad():
                    model.get_submodule(path).weight += 3 * tensors[key.replace("lora_A", "lora_B")] @ down
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[2]])).logits


def test_each_request_has_its_own_packs_and_unloading_restores_the_bits(tmp_path: Path, engine: New) -> None:
    folders = {name: pack(tmp_path / name, seed) for seed, name in enumerate(("law", "code"), start=1)}
    model = make("peer")
    for name, folder in folders.items():
        load_pack(model, folder, name)
    choices: list[tuple[str, ...]] = [(), ("law",), ("code",), ("code", "law")]
    expected = {}
    for names in choices:
        for prompt in PROMPTS:
            with choose_packs(model, [names]):
                expected[names, prompt] = alone(model, prompt, 8)
    for name in folders:
        unload_pack(model, name)
    before = logits(model)
    assert len({tuple(expected[names, PROMPTS[0]]) for names in choices}) == 4
    served = engine(model, slots=5, chunk=8)
    long = served.submit(greedy((3,), 31))
    for name, folder in folders.items():
        assert served.load(name, folder).kind == "pack"
    assert sorted(served.loaded()) == ["code", "law"]
    handles = {key: served.submit(greedy(key[1], 8, packs=key[0])) for key in expected}
    for key, handle in handles.items():
        assert tokens_of(handle) == expected[key], key
    for name in folders:
        served.unload(name)
    assert tokens_of(long) == alone(model, (3,), 31)
    assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match="no pack or adapter 'law' is loaded; there is none"):
        served.submit(greedy((3,), 1, packs=("law",)))


def test_a_pack_is_read_while_requests_are_answered(
    tmp_path: Path, engine: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, read = pack(tmp_path / "law", 1), make("peer"), threading.Event()
    read_tensors = packs.read_tensors

    def reading(*arguments: Any) -> dict[str, torch.Tensor]:
        read.set()
        return read_tensors(*arguments)

    monkeypatch.setattr(packs, "read_tensors", reading)
    served = engine(model)
    gate = Gate(model)
    handle = served.submit(greedy((3,), 5))
    assert gate.reached.wait(10)
    loading = threading.Thread(target=served.load, args=("law", folder))
    loading.start()
    assert read.wait(10)
    assert not served.loaded()
    gate.open()
    loading.join(10)
    assert sorted(served.loaded()) == ["law"]
    assert tokens_of(handle) == alone(make("peer"), (3,), 5)


def test_one_name_is_loaded_by_one_of_many_threads(tmp_path: Path, engine: New) -> None:
    folder, served = pack(tmp_path / "law", 1), engine(make("peer"))

    def load(_: int) -> str:
        try:
            return served.load("law", folder).name
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        found = sorted(threads.map(load, range(4)))
    assert found == ["'law' is loaded already; unload it first, or take another name"] * 3 + ["law"]
    served.unload("law")


def test_packs_and_adapters_go_beside_tables_whose_rows_stay_on_the_host(tmp_path: Path, engine: New) -> None:
    folders = {"law": pack(tmp_path / "law", 1), "low": lora(tmp_path / "low", 2, ("q_proj", "o_proj"), "peer")}
    plain, model = engine(make("peer")), make("peer")
    assert cache_tables(model, torch.device("cpu"), 56)  # of 64 rows
    cached = engine(model)
    for served in (plain, cached):
        for name, folder in folders.items():
            served.load(name, folder)
    choices: list[tuple[str, ...]] = [(), ("law",), ("low",), ("law", "low")]
    found = [
        [tokens_of(served.submit(greedy(PROMPTS[2], 8, packs=names))) for names in choices]
        for served in (plain, cached)
    ]
    assert found[0] == found[1]
    assert found[0][0] != found[0][1] != found[0][3]
    cached.unload("law")
    assert tokens_of(cached.submit(greedy(PROMPTS[2], 8))) == found[0][0]


def test_each_request_has_its_own_adapters_and_unloading_restores_the_bits(tmp_path: Path, engine: New) -> None:
    first, second = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2, ("v_proj", "up_proj", "down_proj"))
    models = {(): merged(), ("a",): merged(first), ("b",): merged(second), ("a", "b"): merged(first, second)}
    expected = {(names, prompt): alone(models[names], prompt, 8) for names in models for prompt in PROMPTS}
    assert len({tuple(expected[names, PROMPTS[0]]) for names in models}) == 4
    model = make("llama")
    before = logits(model)
    served = engine(model, slots=5, chunk=8)
    long = served.submit(greedy((3,), 31))
    assert [served.load(folder.name, folder).kind for folder in (first, second)] == ["adapter", "adapter"]
    handles = {key: served.submit(greedy(key[1], 8, packs=key[0])) for key in expected}
    for key, handle in handles.items():
        assert tokens_of(handle) == expected[key], key
    for name in ("a", "b"):
        served.unload(name)
    assert tokens_of(long) == alone(models[()], (3,), 31)
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_library_retrieves_adapters_for_each_prompt(tmp_path: Path, engine: New) -> None:
    model = make("llama")
    library = library_of(tmp_path / "library", model, *(lora(tmp_path / name, n) for n, name in enumerate("abc")))
    expected = []
    for prompt in PROMPTS:
        with library:
            expected.append(alone(model, prompt, 8))
    assert expected[0] != alone(model, PROMPTS[0], 8)
    served = engine(model)
    assert served.load("all", tmp_path / "library").kind == "library"
    handles = [served.submit(greedy(prompt, 8, packs=("all",))) for prompt in PROMPTS]
    assert [tokens_of(handle) for handle in handles] == expected


def test_a_library_does_not_see_packs_that_others_loaded(tmp_path: Path, engine: New) -> None:
    model = make("peer")
    adapters = [lora(tmp_path / name, seed, ("q_proj", "o_proj"), "peer") for seed, name in enumerate("abc")]
    library_of(tmp_path / "library", model, *adapters)
    served = engine(model, prefix_bytes=0)
    served.load("all", tmp_path / "library")

    def found() -> list[list[int]]:
        return [tokens_of(served.submit(greedy(prompt, 8, packs=("all",)))) for prompt in PROMPTS]

    choices = [served._additions.choice(["all"], prompt) for prompt in PROMPTS]
    texts = found()
    served.load("law", pack(tmp_path / "law", 1))
    assert [served._additions.choice(["all"], prompt) for prompt in PROMPTS] == choices
    assert found() == texts


def test_an_adapter_of_a_library_that_is_not_finite_fails_its_own_requests_alone(tmp_path: Path, engine: New) -> None:
    model = make("llama")
    library_of(tmp_path / "library", model, *(lora(tmp_path / name, seed) for seed, name in enumerate("abc")))
    served = engine(model, chunk=32)
    served.load("all", tmp_path / "library")
    expected = [tokens_of(served.submit(greedy(prompt, 8, packs=("all",)))) for prompt in PROMPTS]
    served.unload("all")
    spoil(tmp_path / "library" / "b")
    served.load("all", tmp_path / "library")
    gate = Gate(model)
    handles = [served.submit(greedy(prompt, 8, packs=("all",))) for prompt in PROMPTS]
    gate.open()
    first, spoiled, last = (list(handle) for handle in handles)
    assert [tokens_of(first), tokens_of(last)] == [expected[0], expected[2]]
    assert "b has numbers for model.layers.0" in str(spoiled[-1].error)


def test_adapters_of_a_library_that_no_request_names_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerlm.serve.additions.MOST_BYTES", 0)
    model, used = make("llama"), list[Choice]()
    library_of(tmp_path / "library", model, *(lora(tmp_path / name, seed) for seed, name in enumerate("abc")))
    additions = Additions(model, lambda: used)
    for name, folder in (("all", tmp_path / "library"), ("one", tmp_path / "a")):
        additions.read(name, folder)[1]()
    of_first, of_second = ({name for name, _ in additions.choice(["all"], prompt).adapters} for prompt in PROMPTS[:2])
    assert of_first != of_second
    assert set(additions._adapters) == {"one", *of_second}
    used.append(additions.choice(["all"], PROMPTS[0]))
    additions.choice(["all"], PROMPTS[1])
    assert set(additions._adapters) == {"one", *of_first, *of_second}
    used.clear()
    additions.choice(["one"], PROMPTS[1])
    assert set(additions._adapters) == {"one"}


def test_unloading_waits_for_requests_that_run(tmp_path: Path, engine: New) -> None:
    model = make("llama")
    served = engine(model)
    served.load("a", lora(tmp_path / "a", 1))
    gate = Gate(model)
    handle = served.submit(greedy((3,), 5, packs=("a",)))
    assert gate.reached.wait(10)
    with pytest.raises(InUse, match=r"1 requests still use 'a' after 0\.01 seconds; try again later"):
        served.unload("a", timeout=0.01)
    assert served.loaded()["a"].running == 1
    unloading = threading.Thread(target=served.unload, args=("a",))
    unloading.start()
    while "a" in served.loaded():
        pass
    with pytest.raises(UserError, match="no pack or adapter 'a' is loaded"):
        served.submit(greedy((3,), 5, packs=("a",)))
    gate.open()
    unloading.join(10)
    assert tokens_of(handle) == alone(merged(tmp_path / "a"), (3,), 5)


def test_a_cached_prompt_is_used_with_its_own_packs_alone(tmp_path: Path, engine: New) -> None:
    prompt = tuple(range(3, 23))
    served = engine(make("llama"))
    for name, seed in (("a", 1), ("a", 2)):
        folder = lora(tmp_path / f"{name}{seed}", seed)
        served.load(name, folder)
        expected = alone(merged(folder), prompt, 4)
        found = [list(served.submit(greedy(prompt, 4, packs=packs))) for packs in ((), (name,), (name,))]
        assert [tokens_of(events) for events in found[1:]] == [expected, expected]
        assert [events[0].cached_tokens for events in found[1:]] == [0, 19]
        served.unload(name)


def test_what_cannot_be_loaded_is_refused_and_nothing_changes(tmp_path: Path, engine: New) -> None:
    served = engine(make("llama"))
    good = lora(tmp_path / "good", 1)
    broken = lora(tmp_path / "broken", 1)
    spoil(broken)
    served.load("a", good)
    for name, folder, message in [
        ("a", good, "'a' is loaded already; unload it first, or take another name"),
        ("b", broken, "numbers for .* that are not finite"),
        ("b", tmp_path / "none", "is no folder; name one that has a pack, an adapter or a library"),
        ("../b", good, r"cannot be called '\.\./b'"),
        ("b", tmp_path, "manifest.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            served.load(name, folder)
    with pytest.raises(UserError, match="no pack or adapter 'b' is loaded; there is a"):
        served.unload("b")
    assert sorted(served.loaded()) == ["a"]
