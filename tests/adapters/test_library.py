"""A library of LoRA adapters against peft's own and against merged weights; retrieval, files, cache and errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peerlm.adapters.library import AdapterLibrary
from peerlm.adapters.library.keys import Keys
from peerlm.adapters.library.lora_files import read_lora
from peerlm.errors import UserError
from peerlm.model import PeerConfig, PeerForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
IDS = torch.tensor([[3, 9, 4, 12, 7, 5], [40, 33, 47, 38, 41, 36], [5, 11, 8, 3, 10, 6]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, initializer_range=0.2)).eval()


def peer() -> PeerForCausalLM:
    torch.manual_seed(0)
    settings = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 4}
    return PeerForCausalLM(PeerConfig(**SIZES, peer=settings, ffw_layers=["dense", "peer", "dense"])).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2)).eval()


def save_lora(
    folder: Path, base: Callable[[], PreTrainedModel] = llama, *, seed: int, scale: float = 0.3, **settings: Any
) -> Path:
    """A random adapter as peft saves it."""
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | settings
    model = get_peft_model(base(), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    return model(input_ids=ids, **options).logits


def texts_of(low: int, *, number: int, seed: int = 0, length: int = 12) -> list[Tensor]:
    """Token ids of a domain that writes with the 16 tokens from `low` on."""
    generator = torch.Generator().manual_seed(seed + low)
    return [torch.randint(low, low + 16, (length,), generator=generator) for _ in range(number)]


@pytest.fixture
def library(tmp_path: Path) -> AdapterLibrary:
    """Three adapters of different ranks and targets, and keys from texts."""
    return new_library(tmp_path)


def new_library(tmp_path: Path, **settings: Any) -> AdapterLibrary:
    made = AdapterLibrary(llama(), tmp_path / "library", window=6, **settings)
    made.add(save_lora(tmp_path / "low", seed=1), texts=texts_of(0, number=6))
    targets = ["q_proj", "v_proj", "down_proj", "o_proj"]
    other = save_lora(tmp_path / "b", seed=2, r=3, target_modules=targets, use_rslora=True)
    made.add(other, texts=texts_of(32, number=6), name="middle")
    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}}
    made.add(save_lora(tmp_path / "high", seed=3, **patterns), texts=texts_of(48, number=6))
    return made


def merged(tmp_path: Path, weights: dict[str, float], library: AdapterLibrary) -> Tensor:
    """Logits of a model into whose weights peft has merged these adapters, one after another."""
    base = llama()
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    total = {name: value.clone() for name, value in plain.items()}
    for name, weight in weights.items():
        one = PeftModel.from_pretrained(llama(), library.folder / name).merge_and_unload()
        for key, value in one.state_dict().items():
            total[key] += weight * (value - plain[key])
    base.load_state_dict(total)
    return logits(base)


@pytest.mark.usefixtures("float64")
def test_retrieved_mix_is_that_of_merged_weights_for_each_sequence(library: AdapterLibrary, tmp_path: Path) -> None:
    weights, names = library.retrieve(IDS)
    assert weights.shape == (3, 2)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert [row[0] for row in names] == ["low", "middle", "low"]
    with library:
        found = logits(library.model)
    for row, (own_weights, own_names) in enumerate(zip(weights.tolist(), names, strict=True)):
        expected = merged(tmp_path, dict(zip(own_names, own_weights, strict=True)), library)[row]
        torch.testing.assert_close(found[row], expected)


@pytest.mark.usefixtures("float64")
def test_fixed_weights_are_used_for_every_sequence(library: AdapterLibrary, tmp_path: Path) -> None:
    for weights in ({"high": 1.0}, {"low": 0.3, "middle": -0.5, "high": 2.0}):
        with library.using(weights):
            found = logits(library.model)
        torch.testing.assert_close(found, merged(tmp_path, weights, library))


@pytest.mark.parametrize("route", ["sequence", "token"])
@pytest.mark.parametrize(
    ("base", "targets"), [(llama, ["q_proj"]), (peer, ["q_proj", "up_proj"]), (gpt2, ["c_attn", "c_fc"])]
)
@pytest.mark.usefixtures("float64")
def test_detached_library_leaves_logits_bit_identical(
    tmp_path: Path, base: Callable[[], PreTrainedModel], targets: list[str], route: str
) -> None:
    model = base()
    expected = logits(model)
    library = AdapterLibrary(model, tmp_path / "library", route=route, layer=1)
    library.add(
        save_lora(tmp_path / "one", base, seed=1, target_modules=targets, fan_in_fan_out=base is gpt2),
        key=torch.ones(16),
    )
    assert torch.equal(logits(model), expected)
    with library:
        assert (logits(model) - expected).abs().max() > 1e-2
        library.retrieve(IDS)
    assert torch.equal(logits(model), expected)
    with library.using({"one": 1.0}):
        adapted = logits(model)
    peft = PeftModel.from_pretrained(base(), tmp_path / "one")
    torch.testing.assert_close(adapted, logits(peft))


@pytest.mark.usefixtures("float64")
def test_padding_and_the_rest_of_the_batch_change_nothing(library: AdapterLibrary) -> None:
    with library:
        alone = logits(library.model, IDS[:1])
        padded = torch.cat([torch.tensor([[63, 62]]), IDS[:1]], dim=1)
        both = torch.cat([padded, torch.arange(8)[None] + 40])
        mask = torch.ones_like(both)
        mask[0, :2] = 0
        position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
        found = logits(library.model, both, attention_mask=mask, position_ids=position_ids)
    torch.testing.assert_close(found[:1, 2:], alone)


@pytest.mark.parametrize("route", ["sequence", "token"])
def test_generation_with_cache_keeps_what_the_prompt_chose(library: AdapterLibrary, route: str) -> None:
    library = AdapterLibrary(library.model, library.folder, route=route)
    library.model.generation_config.eos_token_id = None
    with library:
        written = library.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        if route == "token":
            ids = IDS
            for _ in range(4):
                ids = torch.cat([ids, logits(library.model, ids)[:, -1:].argmax(dim=-1)], dim=1)
            assert torch.equal(written, ids)
    if route == "sequence":
        weights, names = library.retrieve(IDS)
        for row in range(3):
            with library.using(dict(zip(names[row], weights[row].tolist(), strict=True))):
                one = library.model.generate(
                    input_ids=IDS[row : row + 1], max_new_tokens=4, do_sample=False, pad_token_id=0
                )
            assert torch.equal(written[row], one[0])


@pytest.mark.usefixtures("float64")
def test_route_token_is_causal_and_mixes_by_the_mean_up_to_each_token(tmp_path: Path) -> None:
    library = new_library(tmp_path, route="token", layer=2)
    with library:
        whole = logits(library.model)
        torch.testing.assert_close(logits(library.model, IDS[1:, :4]), whole[1:, :4])
        past = library.model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        steps = [logits(library.model, IDS[:, t : t + 1], past_key_values=past) for t in range(3, 6)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 3:])
    hidden = library.model(input_ids=IDS, output_hidden_states=True).hidden_states[2].detach()
    for tokens in (1, 4, 6):
        weights, names = library.retrieve(hidden[:, :tokens])
        assert library._attached.mix is None
        with library:
            logits(library.model)
            mix = library._attached.mix
        assert mix is not None
        position = [[library.cache(name) for name in row] for row in names]
        for row in range(3):
            for weight, adapter in zip(weights[row].tolist(), position[row], strict=True):
                column = next(i for i, other in enumerate(mix.adapters) if other is adapter)
                assert mix.weights[row, tokens - 1, column].item() == pytest.approx(weight)


def test_texts_of_each_domain_retrieve_its_adapter(library: AdapterLibrary) -> None:
    library.top_k = 1
    right = []
    for low, name in ((0, "low"), (32, "middle"), (48, "high")):
        held_out = torch.stack(texts_of(low, number=40, seed=1000))
        right += [found == [name] for found in library.retrieve(held_out)[1]]
    assert sum(right) >= 0.9 * len(right)


def test_fitted_keys_are_better_on_texts_they_were_fitted_to(tmp_path: Path) -> None:
    library = AdapterLibrary(llama(), tmp_path / "library", window=6, top_k=1)
    for number, low in enumerate((0, 4, 8)):
        library.add(save_lora(tmp_path / f"a{low}", seed=number), texts=texts_of(low, number=2))
    texts = {f"a{low}": texts_of(low, number=30, seed=7) for low in (0, 4, 8)}

    def accuracy() -> float:
        rows = [(found == [name]) for name, own in texts.items() for found in library.retrieve(torch.stack(own))[1]]
        return sum(rows) / len(rows)

    before, keys = accuracy(), library.keys.clone()
    fitted = library.fit_keys(texts)
    assert accuracy() > before + 0.1
    held_out = {name: torch.cat(own[-6:]).view(-1, 6) for name, own in texts.items()}  # the last 12 of 60 pieces
    right = [found == [name] for name, pieces in held_out.items() for found in library.retrieve(pieces)[1]]
    assert fitted == pytest.approx(sum(right) / 36)
    with pytest.raises(ValueError, match="no adapter has two pieces of 6 tokens to fit keys to"):
        library.fit_keys({"a0": [IDS[0]]})
    assert not torch.allclose(library.keys, keys)
    opened = AdapterLibrary(llama(), library.folder)
    assert torch.equal(opened.keys, library.keys)
    assert opened._keys.temperature == library._keys.temperature != 1.0


@pytest.mark.usefixtures("float64")
def test_scores_are_gaussian_log_probabilities_with_the_shrunk_covariance() -> None:
    features = {name: torch.randn(20, 4) @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0])) + 5 for name in "ab"}
    keys = Keys.empty(4)
    for name, own in features.items():
        keys = keys.with_adapter(name, own.mean(dim=0), own)
    centred = torch.cat([own - own.mean(dim=0) for own in features.values()]).double()
    covariance = centred.T @ centred / 38
    share = 4 / 42
    covariance = (1 - share) * covariance + share * covariance.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    query = torch.randn(3, 4) + 5
    expected = [
        torch.distributions.MultivariateNormal(own.mean(dim=0).double(), covariance).log_prob(query.double())
        for own in features.values()
    ]
    found = keys.scorer()(query)
    torch.testing.assert_close(found.log_softmax(dim=-1), torch.stack(expected, dim=-1).log_softmax(dim=-1))
    assert keys.without("a").names == ("b",)


def test_reopened_library_gives_the_same_logits(library: AdapterLibrary) -> None:
    with library:
        expected = logits(library.model)
    opened = AdapterLibrary(llama(), library.folder)
    assert opened.names == ("low", "middle", "high")
    with opened:
        assert torch.equal(logits(opened.model), expected)
    files = {path.name for path in library.folder.iterdir() if path.is_file()}
    assert len(files) == 2
    assert "library.json" in files
    opened.remove("middle")
    assert AdapterLibrary(llama(), library.folder).names == ("low", "high")
    opened.add(library.folder / "middle", key=torch.zeros(16))
    assert len(opened) == 3


def test_a_write_that_dies_leaves_the_library_as_it_was(
    library: AdapterLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = save_lora(tmp_path / "new", seed=9)
    plain = Path.replace

    def die(path: Path, target: Path) -> Path:
        if target.name == "library.json":
            raise KeyboardInterrupt
        return plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            library.add(new, key=torch.zeros(16))
    assert library.names == ("low", "middle", "high")
    opened = AdapterLibrary(llama(), library.folder)
    assert opened.names == ("low", "middle", "high")
    assert torch.equal(opened.retrieve(IDS)[0], library.retrieve(IDS)[0])
    assert opened.add(library.folder / "new", key=torch.zeros(16)) == "new"


def test_cache_keeps_the_adapters_used_last_within_its_limit(library: AdapterLibrary) -> None:
    one = sum(term.num_bytes for term in read_lora(library.folder / "low").values())
    opened = AdapterLibrary(llama(), library.folder, top_k=1, cache_bytes=4 * one)
    assert opened.cache.num_bytes == 0
    for names, loads in ((["low"], 1), (["low"], 1), (["high"], 2), (["low"], 2), (["middle"], 3), (["high"], 4)):
        for name in names:
            with opened.using({name: 1.0}):
                logits(opened.model)
        assert opened.cache.loads == loads
        assert opened.cache.num_bytes <= opened.cache.max_bytes
        assert names[-1] in opened.cache
    none = AdapterLibrary(llama(), library.folder, cache_bytes=0)
    with library, none:
        assert torch.equal(logits(none.model), logits(library.model))
    assert none.cache.num_bytes == 0


def test_adapters_in_bfloat16_and_a_base_in_bfloat16(library: AdapterLibrary, tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    wide = AdapterLibrary(model, library.folder)
    with wide:
        found = logits(model)
    assert found.dtype == torch.bfloat16
    with library:
        exact = logits(library.model)
    plain = (logits(llama().to(torch.bfloat16)).float() - logits(llama())).norm()
    assert (found.float() - exact).norm() < 4 * plain + 0.05 * exact.norm()


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; a library takes LORA alone"),
        ({"use_dora": True}, "has use_dora = True, which a library cannot mix"),
        ({"bias": "all"}, "has bias = 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights = 'pissa_niter_4'"),
        ({"arrow_config": {"top_k": 2}}, "has arrow_config"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"lora_alpha": None}, "has lora_alpha = None; it must be a number"),
    ],
)
def test_adapters_that_cannot_be_mixed_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save_lora(tmp_path / "one", seed=1)
    rewrite_config(folder, **change)
    library = AdapterLibrary(llama(), tmp_path / "library")
    with pytest.raises(UserError, match=message):
        library.add(folder, key=torch.zeros(16))
    assert not (tmp_path / "library").exists()


def test_damaged_pickled_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    library = AdapterLibrary(llama(), tmp_path / "library")
    key = torch.zeros(16)
    with pytest.raises(UserError, match="is no adapter folder"):
        library.add(tmp_path / "gone", key=key)
    folder = save_lora(tmp_path / "one", seed=1)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file(tensors | {"base_model.model.lm_head.lora_embedding_A": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=r"has 'base_model\.model.lm_head.lora_embedding_A', which is no low-rank term"):
        library.add(folder, key=key)
    save_file({name: value for name, value in tensors.items() if name != first}, path)
    with pytest.raises(UserError, match="do not fit together"):
        library.add(folder, key=key)
    save_file({}, path)
    with pytest.raises(UserError, match="is empty"):
        library.add(folder, key=key)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        library.add(folder, key=key)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="only a pickled one, which is not opened"):
        library.add(folder, key=key)
    with pytest.raises(UserError, match=r"adapts transformer.h.0.attn.c_attn, which is no linear layer of the model"):
        library.add(save_lora(tmp_path / "two", gpt2, seed=1, target_modules=["c_attn"], fan_in_fan_out=True), key=key)
    narrow = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(1, 8),
        "base_model.model.lm_head.lora_B.weight": torch.ones(64, 1),
    }
    save_file(narrow, path)
    with pytest.raises(UserError, match="adapts lm_head from 8 to 64 features, but the model's has 16 and 64"):
        library.add(folder, key=key)


def test_wrong_arguments_are_named(library: AdapterLibrary, tmp_path: Path) -> None:
    model, low = library.model, library.folder / "low"
    for settings, message in (
        ({"route": "document"}, "route is 'document'; choose one of sequence, token"),
        ({"top_k": 0}, "top_k is 0"),
        ({"window": 0}, "window is 0"),
        ({"layer": 4}, "layer is 4; the model has blocks 1 to 3"),
        ({"cache_bytes": -1}, "cache_bytes is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterLibrary(model, tmp_path / "other", **settings)
    for arguments, message in (
        ({}, "give texts of the adapter's domain, or its key"),
        ({"texts": [IDS[0]], "key": torch.zeros(16)}, "and not both"),
        ({"key": torch.zeros(15)}, r"key has shape \(15,\); it must be \(16,\)"),
        ({"texts": ["a string"]}, "the library has no tokenizer"),
        ({"texts": []}, "there is no text to make a key from"),
        ({"texts": "a string"}, "texts is one str; give a list of texts"),
        ({"texts": IDS[0]}, "texts is one Tensor; give a list of texts"),
        ({"texts": [IDS]}, r"a text has token ids of shape \(3, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            library.add(save_lora(tmp_path / "fresh", seed=1), **arguments)
    for name in ("", "..", "a/b", ".hidden", "a\\b"):
        with pytest.raises(UserError, match="an adapter cannot be named"):
            library.add(tmp_path / "fresh", key=torch.zeros(16), name=name)
    with pytest.raises(UserError, match="has an adapter 'low' already"):
        library.add(tmp_path / "low", key=torch.zeros(16))
    with pytest.raises(UserError, match="so its name is 'low', not 'x'"):
        library.add(low, key=torch.zeros(16), name="x")
    (library.folder / "fresh").mkdir()
    with pytest.raises(UserError, match="is there already; add that folder"):
        library.add(tmp_path / "fresh", key=torch.zeros(16))
    with pytest.raises(UserError, match="has no adapter 'gone'; it has low, middle, high"):
        library.remove("gone")
    with pytest.raises(ValueError, match="there are no texts to fit keys to"):
        library.fit_keys({})
    with pytest.raises(ValueError, match="has no adapters yet; add some"):
        AdapterLibrary(model, tmp_path / "other").retrieve(IDS)


def test_wrong_calls_of_the_model_are_named(library: AdapterLibrary) -> None:
    with library:
        with pytest.raises(ValueError, match="pass these, not inputs_embeds"):
            library.model(inputs_embeds=torch.randn(1, 3, 16))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 6, 6\)"):
            logits(library.model, attention_mask=torch.ones(3, 1, 6, 6))
    past = library.model(input_ids=IDS, use_cache=True).past_key_values
    for route in ("sequence", "token"):
        other = AdapterLibrary(library.model, library.folder, route=route)
        with other, pytest.raises(ValueError, match="past_key_values hold a prompt of 3 sequences whose adapters are"):
            logits(library.model, IDS[:, :1], past_key_values=past)
    with library:
        past = library.model(input_ids=IDS[:2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values hold a prompt of 3 sequences"):
            logits(library.model, IDS[:, :1], past_key_values=past)
    mix = library._attached._mix_of(*library._choose(torch.zeros(3, 16)))
    with pytest.raises(ValueError, match=r"q_proj reads \(18, 16\), but adapters were chosen for \(3,\) sequences"):
        mix.output("model.layers.0.self_attn.q_proj", torch.zeros(18, 16))


def test_arguments_of_the_model_may_be_given_by_position(library: AdapterLibrary) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    other = IDS.clone()
    other[0, :3] = torch.tensor([50, 60, 55])  # what stands at padding would choose another adapter
    with library, torch.no_grad():
        assert torch.equal(library.model(other, mask).logits, logits(library.model, other, attention_mask=mask))


@pytest.mark.parametrize("route", ["sequence", "token"])
def test_conversations_that_alternate_keep_adapters_of_their_own(library: AdapterLibrary, route: str) -> None:
    library = AdapterLibrary(library.model, library.folder, route=route)
    one, other = IDS[:1], IDS[1:2]
    with library, torch.no_grad():
        past = library.model(input_ids=one, use_cache=True).past_key_values
        expected = logits(library.model, one[:, :1], past_key_values=past)
        past = library.model(input_ids=one, use_cache=True).past_key_values
        library.model(input_ids=other, use_cache=True)
        assert torch.equal(logits(library.model, one[:, :1], past_key_values=past), expected)


def test_keys_are_made_without_changing_modes(library: AdapterLibrary) -> None:
    library.model.train()
    frozen = library.model.model.layers[0].eval()
    modes = [module.training for module in library.model.modules()]
    library.features([IDS[0]])
    assert [module.training for module in library.model.modules()] == modes
    assert not frozen.training


def test_names_of_the_librarys_own_files_are_refused(library: AdapterLibrary, tmp_path: Path) -> None:
    for name in ("library.json", "keys-0.safetensors"):
        with pytest.raises(UserError, match="an adapter cannot be named"):
            library.add(tmp_path / "low", key=torch.zeros(16), name=name)
    assert AdapterLibrary(llama(), library.folder).names == library.names


def test_damaged_and_foreign_libraries_are_refused(library: AdapterLibrary) -> None:
    folder = library.folder
    with pytest.raises(UserError, match=r"layer is 1, but .* has keys of layer 2"):
        AdapterLibrary(llama(), folder, layer=1)
    config = LlamaConfig(**SIZES | {"hidden_size": 8}, intermediate_size=8)
    with pytest.raises(UserError, match="has keys of 16 features after block 2, but the model has 8 features"):
        AdapterLibrary(LlamaForCausalLM(config), folder)
    (folder / "low").rename(folder / "lost")
    with pytest.raises(UserError, match=r"names 'low', but .* is not there"):
        AdapterLibrary(llama(), folder)
    manifest = folder / "library.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="has version 2; this peerlm reads version 1"):
        AdapterLibrary(llama(), folder)
    manifest.write_text(text.replace('"low"', '"../low"'))
    with pytest.raises(UserError, match="cannot be named"):
        AdapterLibrary(llama(), folder)
    for damaged in (text[:-20], text.replace("keys-", "../keys-"), text.replace('    "high"', '    "high", "more"')):
        manifest.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            AdapterLibrary(llama(), folder)


def test_models_without_a_list_of_blocks_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    with pytest.raises(ValueError, match="has no list of its 3 blocks"):
        AdapterLibrary(model, tmp_path)


def test_pieces_of_strings_begin_as_prompts_do(make_tokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("spaces", template="<s> $A </s>", bos="<s>")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}, intermediate_size=24)).eval()
    text = "river lantern moss quiet copper ladder winter"
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    options: dict[str, Any] = {"tokenizer": tokenizer, "window": 4}
    made = AdapterLibrary(base, tmp_path / "library", **options)
    pieces = [torch.cat([torch.tensor([0]), ids[:3]]), torch.cat([torch.tensor([0]), ids[3:6]])]
    assert torch.equal(made.features([text]), made.features(pieces))
    bare = AdapterLibrary(base, tmp_path / "bare", **options, document_start="none")
    assert torch.equal(bare.features([text]), bare.features([ids[:4]]))
    with pytest.raises(ValueError, match="window is 1, but 1 tokens begin each piece"):
        AdapterLibrary(base, tmp_path / "narrow", tokenizer=tokenizer, window=1)
