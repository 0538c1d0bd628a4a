"""Options of the backbone: normed queries and keys, shifted keys and values, a sink, and a gate on the output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from peerlm.model import PeerForCausalLM
from peerlm.model.attention import PeerAttention
from peerlm.optim import parameter_groups

pytestmark = pytest.mark.usefixtures("float64")

Build = Callable[..., PeerForCausalLM]
ALL: dict[str, Any] = {"qk_norm": True, "kv_shift": True, "attention_sink": True, "ffw_output_gate": "feature"}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def trained(tiny_model: Build) -> Build:
    """A function: settings -> a model in evaluation whose options are not what they start as."""

    def build(**settings: Any) -> PeerForCausalLM:
        model = tiny_model(**({"num_key_value_heads": 2} | settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("q_norm", "k_norm", "shift", "sinks", "ffw_gate")):
                    parameter.add_(torch.randn_like(parameter))
        return model

    return build


def draw(*shape: int) -> Tensor:
    return torch.randint(1, 64, shape)


def normed(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight if hasattr(norm, "weight") else x


def rotated(x: Tensor, position: int) -> Tensor:
    half = len(x) // 2
    angles = position * 10000.0 ** -(torch.arange(half) / half)
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def plain_attention(layer: PeerAttention, x: Tensor) -> Tensor:
    """The definition, one head and token at a time: x (S, D) -> (S, D)."""
    size, groups = layer.head_dim, layer.num_key_value_groups
    outputs = []
    for head in range(layer.config.num_attention_heads):
        group = head // groups
        query = normed(x @ layer.q_proj.weight[head * size : (head + 1) * size].T, layer.q_norm)
        key = normed(x @ layer.k_proj.weight[group * size : (group + 1) * size].T, layer.k_norm)
        value = x @ layer.v_proj.weight[group * size : (group + 1) * size].T
        if layer.shift is not None:
            shift = layer.shift
            before = [torch.cat([torch.zeros(1, size), each[:-1]]) for each in (key, value)]
            key = shift.key[group] * key + shift.previous_key[group] * before[0]
            value = shift.value[group] * value + shift.previous_value[group] * before[1]
        rows = []
        for i in range(len(x)):
            scores = torch.stack([rotated(query[i], i) @ rotated(key[j], j) * size**-0.5 for j in range(i + 1)])
            if layer.sinks is not None:
                scores = torch.cat([scores, layer.sinks[head : head + 1]])
            rows.append(scores.softmax(0)[: i + 1] @ value[: i + 1])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("option", [*list(ALL)[:3], "all"])
def test_attention_is_its_definition(trained: Build, option: str, implementation: str) -> None:
    settings = ALL if option == "all" else {option: True}
    model = trained(**settings, attn_implementation=implementation)
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[1].self_attn
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=kwargs["hidden_states"], y=output[0]), with_kwargs=True
    )
    model(draw(1, 7))
    torch.testing.assert_close(seen["y"][0], plain_attention(layer, seen["x"][0]))


@pytest.mark.parametrize(
    "settings",
    [{"kv_shift": True}, {"ffw_output_gate": "token"}, {"ffw_output_gate": "feature"}],
)
def test_at_the_start_these_change_nothing(tiny_model: Build, settings: dict[str, Any]) -> None:
    model, plain, ids = tiny_model(**settings).eval(), tiny_model().eval(), draw(2, 9)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(("groups", "previous"), [(4, [0, 1 / 3, 2 / 3, 1]), (2, [0, 1]), (1, [0.5])])
def test_keys_may_start_spread_over_the_heads(tiny_model: Build, groups: int, previous: list[float]) -> None:
    for layer in tiny_model(kv_shift=True, kv_shift_init="spread", num_key_value_heads=groups).model.layers:
        shift = layer.self_attn.shift
        torch.testing.assert_close(shift.previous_key, torch.tensor(previous).float())
        torch.testing.assert_close(shift.key, 1 - torch.tensor(previous).float())
        assert shift.value.tolist() == [1] * groups
        assert shift.previous_value.tolist() == [0] * groups


def test_every_option_is_trained_without_weight_decay_of_its_vectors(tiny_model: Build) -> None:
    model, ids = tiny_model(**ALL), draw(4, 16)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or "query_norm.bias" in name, name
    vectors = next(group["params"] for group in parameter_groups(model) if group["name"] == "vector")
    for name, parameter in model.named_parameters():
        if "shift" in name or "sinks" in name:
            assert any(parameter is each for each in vectors), name


def test_a_gate_multiplies_what_the_layer_adds(trained: Build) -> None:
    model = trained(ffw_output_gate="token", ffw_layers="dense")
    block, x = model.model.layers[0], torch.randn(2, 5, 32)
    factors = 2 / (1 + torch.exp(-x @ block.ffw_gate.weight.T))
    torch.testing.assert_close(block.ffw_gate(x), factors)
    seen: dict[str, Tensor] = {}
    block.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.update(h=args[0], x=out))
    block.register_forward_hook(lambda module, args, out: seen.update(out=out))
    model(draw(2, 5))
    expected = seen["h"] + block.ffw(seen["x"]) * block.ffw_gate(seen["x"])
    torch.testing.assert_close(seen["out"], expected)


@pytest.mark.parametrize("static", [False, True])
def test_cached_steps_equal_one_pass(trained: Build, static: bool) -> None:
    model, ids = trained(**ALL), draw(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=12) if static else None
    logits = []
    with torch.no_grad():
        for part in ids.split([4, 1, 3, 1], dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(trained: Build, side: str) -> None:
    model, ids = trained(**ALL), draw(2, 7)
    padding, ones = draw(2, 3), torch.ones(2, 7, dtype=torch.long)
    none = torch.zeros(2, 3, dtype=torch.long)
    parts, masks = ([padding, ids], [none, ones]) if side == "left" else ([ids, padding], [ones, none])
    mask = torch.cat(masks, dim=1)
    with torch.no_grad():
        logits = model(torch.cat(parts, dim=1), attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()].view(2, 7, -1), model(ids).logits)


@pytest.mark.parametrize("given", ["positions", "bool mask", "float mask"])
def test_packed_texts_do_not_see_each_other(trained: Build, given: str) -> None:
    model, texts = trained(**ALL), [draw(1, 4), draw(1, 1), draw(1, 5)]
    lengths = [text.shape[1] for text in texts]
    number = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    more: dict[str, Any] = {"position_ids": positions}
    if given != "positions":
        mask = ((number[:, None] == number) & torch.ones(10, 10, dtype=torch.bool).tril())[None, None]
        float_mask = torch.zeros(1, 1, 10, 10).masked_fill(~mask, torch.finfo(torch.float64).min)
        more = {"attention_mask": mask if given == "bool mask" else float_mask}
    with torch.no_grad():
        packed = model(torch.cat(texts, dim=1), use_cache=False, **more).logits
        torch.testing.assert_close(packed, torch.cat([model(text).logits for text in texts], dim=1))


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {}, {"num_beams": 3}])
def test_generation_of_left_padded_prompts_equals_each_alone(trained: Build, settings: dict[str, Any]) -> None:
    model, prompts = trained(**ALL), [draw(1, 3), draw(1, 6)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 6 - prompt.shape[1] :], mask[row, 6 - prompt.shape[1] :] = prompt[0], 1
    together = model.generate(ids, attention_mask=mask, disable_compile=True, **GREEDY, **settings)
    beams = {name: value for name, value in settings.items() if name == "num_beams"}
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, use_cache=False, **GREEDY, **beams)
        assert torch.equal(together[row, 6:], alone[0, prompt.shape[1] :])


def test_eager_attention_equals_sdpa_with_padding(trained: Build) -> None:
    model, ids = trained(**ALL), draw(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        fused = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(fused[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


def test_saving_and_loading(trained: Build, tmp_path: Path) -> None:
    model = trained(**ALL)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in ALL} == ALL
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_what_has_no_sink_or_shift_is_refused(tiny_model: Build) -> None:
    model = tiny_model(attention_sink=True)
    with pytest.raises(ValueError, match=r"PeerForCausalLM does not support Flash Attention 2"):
        tiny_model(attention_sink=True, attn_implementation="flash_attention_2")
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(
        ValueError, match=r"attn_implementation is 'paged\|sdpa', which has no sink; choose one of eager"
    ):
        model(draw(1, 3), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"paged caches, .*; generate with another cache, or set kv_shift"):
        tiny_model(kv_shift=True)(draw(1, 3), cache=object())
