"""One new token of each sequence in few native calls: it is the model, and steps aside for whoever looks on."""

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.model.cache_room import LEAST_ROOM, keep, one_more_column
from peerlm.model.one_token import MOST_ROWS, OneToken
from peerlm.ops.cpu import native
from peerlm.testing import assert_within_budget, definition, float64

pytestmark = [
    pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}"),
    pytest.mark.numerical,
]

KINDS: dict[str, dict[str, Any]] = {
    "peer": {"ffw_layers": "peer"},
    "dense, one group of heads": {"ffw_layers": "dense", "num_key_value_heads": 1},
    "swiglu, heads of 6": {"ffw_layers": "swiglu", "hidden_size": 30, "num_attention_heads": 5},
    "normed heads, a gate": {"ffw_layers": "peer:inner", "qk_norm": True, "ffw_output_gate": "feature"},
    "side by side": {"ffw_layers": "peer+dense", "num_key_value_heads": 2},
    "no call for its experts": {"ffw_layers": "fine_grained_moe"},
    "shifted": {"ffw_layers": ["dense", "peer", "dense"], "kv_shift": True, "num_key_value_heads": 2},
    "shifted, no call for its experts": {"ffw_layers": "fine_grained_moe", "kv_shift": True, "qk_norm": True},
    "scaled positions": {
        "ffw_layers": "dense",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    },
}
PROMPT, NEW = 5, 4


@pytest.fixture
def model_of(tiny_config: Callable[..., PeerConfig]) -> Callable[..., PeerForCausalLM]:
    """A function: settings -> a model in evaluation mode, with statistics that are not those of the start."""

    def build(**settings: Any) -> PeerForCausalLM:
        torch.manual_seed(0)
        model = PeerForCausalLM(tiny_config(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "shift" in name:
                    parameter.uniform_(0.5, 1.5)
            model.train()(torch.randint(64, (4, 16)))
        return model.eval()

    return build


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step in few calls: its number of sequences."""
    seen: list[int] = []
    real = OneToken.forward

    def counted(self: OneToken, model: Any, ids: Tensor, *others: Any) -> Tensor | None:
        found = real(self, model, ids, *others)
        seen.extend([] if found is None else [len(ids)])
        return found

    monkeypatch.setattr(OneToken, "forward", counted)
    return seen


def decoded(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    in_parts: bool = False,
    cache: Any = None,
    prompt: int = PROMPT,
) -> Tensor:
    """Logits (B, new, V) of the tokens after the prompt, each in a step of its own; in parts because of gradients."""
    cache = DynamicCache() if cache is None else cache
    found = []
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)

    def step(begin: int, end: int) -> None:
        own_mask = None if mask is None else mask[:, :end]
        own_positions = None if positions is None else positions[:, begin:end]
        logits = model(
            ids[:, begin:end],
            attention_mask=own_mask,
            position_ids=own_positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        found.append(logits[:, -1].detach())

    with torch.no_grad():
        step(0, prompt)
    found.clear()
    with torch.set_grad_enabled(in_parts):
        for place in range(prompt, ids.shape[1]):
            step(place, place + 1)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model(kind: str, model_of: Callable[..., PeerForCausalLM], calls: list[int]) -> None:
    model = model_of(**KINDS[kind])
    ids = torch.randint(64, (3, PROMPT + NEW))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :4] = 0
    actual = decoded(model, ids, mask)
    assert calls == [3] * NEW
    plain = decoded(model, ids, mask, in_parts=True)
    assert calls == [3] * NEW
    with float64():
        exact = decoded(definition(model), ids, mask)
    assert calls == [3] * NEW
    assert_within_budget(actual, plain, exact)
    assert_within_budget(decoded(model, ids[:1]), plain[:1], exact[:1])


@pytest.mark.parametrize("key_norm", [False, True])
@pytest.mark.parametrize("rows", [7, MOST_ROWS])
def test_a_row_has_its_bits_whatever_is_beside_it(
    rows: int, key_norm: bool, model_of: Callable[..., PeerForCausalLM], calls: list[int]
) -> None:
    peer = {"num_experts": 1600, "heads": 2, "experts_per_head": 7, "key_dim": 30, "key_norm": key_norm}
    model = model_of(ffw_layers=["dense", "peer", "swiglu"], peer=peer)
    ids = torch.randint(64, (rows, PROMPT + NEW))
    mask = torch.ones_like(ids)
    mask[3, :2] = 0
    full = DynamicCache()
    with torch.no_grad():
        model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], past_key_values=full, use_cache=True)
    alone = DynamicCache()
    for layer, other in zip(range(3), full.layers, strict=True):
        alone.update(other.keys[3:4, :, 2:].clone(), other.values[3:4, :, 2:].clone(), layer)
    token = ids[:, PROMPT : PROMPT + 1]
    states: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    with torch.no_grad():
        position = torch.full((rows, 1), PROMPT)
        position[3] = PROMPT - 2
        model(token, attention_mask=mask[:, : PROMPT + 1], position_ids=position, past_key_values=full)
        model(token[3:4], past_key_values=alone)
    assert calls == [rows, 1]
    assert torch.equal(states[0][3:4], states[1])
    for mine, theirs in zip(alone.layers, full.layers, strict=True):
        assert torch.equal(mine.keys[0, :, -1], theirs.keys[3, :, -1])


@pytest.mark.parametrize("kv_shift", [False, True])
def test_generate_writes_what_it_writes_in_parts(
    kv_shift: bool, model_of: Callable[..., PeerForCausalLM], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(ffw_layers="peer", max_position_embeddings=128, kv_shift=kv_shift)
    ids = torch.randint(3, 64, (2, 6))
    new = LEAST_ROOM + 10
    for options in ({}, {"num_beams": 2}):
        calls.clear()
        few = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        assert len(calls) == new - 1
        with monkeypatch.context() as patch:
            patch.setattr(OneToken, "forward", lambda *_: None)
            assert torch.equal(
                few, model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
            )


def test_what_changes_in_a_model_is_seen(model_of: Callable[..., PeerForCausalLM], calls: list[int]) -> None:
    model = model_of(ffw_layers="dense", qk_norm=True, kv_shift=True)
    block, ids = model.model.layers[1], torch.randint(64, (1, PROMPT + 1))
    before = decoded(model, ids)

    def changed(change: Callable[[], object]) -> None:
        nonlocal before
        change()
        found = decoded(model, ids)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, decoded(model, ids, in_parts=True))
        before = found

    def put(module: Any, name: str, value: Any) -> None:
        setattr(module, name, value)

    changed(lambda: block.self_attn.k_proj.weight.data.mul_(-1))
    changed(lambda: put(block.self_attn.v_proj.weight, "data", torch.randn(32, 32)))
    changed(lambda: put(block.ffw.up_proj, "weight", nn.Parameter(torch.randn(32, 128))))
    changed(lambda: put(block.self_attn, "scaling", 3.0))
    changed(lambda: put(block.input_layernorm, "variance_epsilon", 5.0))
    changed(lambda: put(model.model.norm, "variance_epsilon", 5.0))
    changed(lambda: put(model.model.rotary_emb, "inv_freq", 2 * model.model.rotary_emb.inv_freq))
    changed(lambda: block.self_attn.q_norm.weight.data.mul_(-1))
    changed(lambda: block.self_attn.shift.previous_key.data.mul_(-2))
    changed(lambda: put(block.self_attn.shift, "value", nn.Parameter(torch.randn(4))))
    assert len(calls) == 11
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(decoded(twin, ids), before)
    assert len(calls) == 13


def test_it_steps_aside(model_of: Callable[..., PeerForCausalLM], calls: list[int]) -> None:
    ids = torch.randint(64, (2, PROMPT + 1))
    for settings in (
        {"attention_sink": True},
        {"attention_bias": True},
        {"ffw_layers": "hashed_ngrams"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    ):
        decoded(model_of(**settings), ids)
    model = model_of(ffw_layers="dense", kv_shift=True)
    decoded(model, torch.randint(64, (MOST_ROWS + 1, PROMPT + 1)))
    decoded(model, ids, cache=StaticCache(config=model.config, max_cache_len=16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded(model, ids)
    block = model.model.layers[2]
    for module in (
        block,
        block.self_attn,
        block.self_attn.shift,
        block.self_attn.o_proj,
        block.post_attention_layernorm,
        model.model.norm,
    ):
        met: list[nn.Module] = []
        hook = module.register_forward_hook(lambda module, inputs, output, met=met: met.append(module))
        decoded(model, ids)
        hook.remove()
        assert met == [module, module]
    instead = block.self_attn.q_proj
    instead.forward = lambda x: 0 * nn.Linear.forward(instead, x)
    decoded(model, ids)
    del instead.forward
    decoded(copy.deepcopy(model).double(), ids)
    assert calls == []
    decoded(model, ids)
    assert calls == [2]
    with torch.no_grad():
        states = model(ids[:, :1], past_key_values=DynamicCache(), output_hidden_states=True).hidden_states
    assert len(states) == 4


def test_weights_of_other_names_and_shapes_are_left_to_the_modules(
    model_of: Callable[..., PeerForCausalLM], calls: list[int]
) -> None:
    ids = torch.randint(64, (1, PROMPT + 1))

    def as_buffer(attention: Any, last_norm: Any) -> None:
        own = attention.shift.key.detach().clone()
        del attention.shift.key
        attention.shift.register_buffer("key", own)

    changes: list[Callable[[Any, Any], object]] = [
        lambda attention, last_norm: prune.l1_unstructured(attention.shift, "key", amount=1),
        as_buffer,
        lambda attention, last_norm: setattr(attention.shift, "key", nn.Parameter(torch.ones(1))),
        lambda attention, last_norm: attention.shift.register_parameter("note", nn.Parameter(torch.ones(1))),
        lambda attention, last_norm: attention.shift.register_parameter("note", None),
        lambda attention, last_norm: setattr(attention.q_norm, "weight", nn.Parameter(torch.ones(1))),
        lambda attention, last_norm: setattr(attention.q_norm, "variance_epsilon", 0.5),
        lambda attention, last_norm: setattr(last_norm, "weight", nn.Parameter(torch.full((1,), 1.3))),
    ]
    for change, ffw in product(changes, ("dense", "fine_grained_moe")):
        model = model_of(ffw_layers=ffw, kv_shift=True, qk_norm=True)
        change(model.model.layers[1].self_attn, model.model.norm)
        torch.testing.assert_close(decoded(model, ids), decoded(model, ids, in_parts=True))
    assert calls == []


def test_a_text_that_begins_anew_sees_no_token_before(
    model_of: Callable[..., PeerForCausalLM], calls: list[int]
) -> None:
    """A new token of position 0, or behind one that the mask hides, has none before it: here in a cache of others."""
    model, ids = model_of(ffw_layers="dense", kv_shift=True), torch.randint(64, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 0, 1]])
    positions = torch.tensor([[3], [0]])
    found, columns = [], []
    for in_parts in (False, True):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True)
        with torch.set_grad_enabled(in_parts):
            step = model(ids[:, 4:], attention_mask=mask, position_ids=positions, past_key_values=cache)
        found.append(step.logits.detach())
        columns.append([layer.keys[:, :, -1, -1].detach() for layer in cache.layers])
    assert calls == [2]
    torch.testing.assert_close(*found)
    for each in (*columns[0], *columns[1]):
        assert not each.any()


def test_a_hidden_new_token_is_left_to_the_modules(model_of: Callable[..., PeerForCausalLM], calls: list[int]) -> None:
    model = model_of(ffw_layers="dense")
    ids, mask = torch.randint(64, (2, PROMPT + 1)), torch.ones(2, PROMPT + 1, dtype=torch.int64)
    mask[1, -1] = 0
    cache = DynamicCache()
    found = decoded(model, ids, mask, cache=cache)
    assert calls == []
    assert cache.get_seq_length() == PROMPT + 1
    torch.testing.assert_close(found, decoded(model, ids, mask, in_parts=True))


def filled(length: int = 3) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4))
    return layer


def write(layer: DynamicLayer, value: float) -> None:
    room = one_more_column(layer)
    assert room is not None
    for part in room:
        part[:, :, -1] = value
    keep(layer, *room)


def test_a_cache_with_room_is_what_a_cache_without_would_be() -> None:
    layer, twin = filled(), DynamicLayer()
    twin.update(layer.keys, layer.values)
    copies, place = 0, 0
    for turn in range(LEAST_ROOM + 2):
        column = torch.full((2, 3, 1, 4), float(turn))
        twin.update(column, column)
        write(layer, turn)
        copies, place = copies + (layer.keys.data_ptr() != place), layer.keys.data_ptr()
        if turn == 5:
            for each in (layer, twin):
                each.crop(-2)
        if turn == 9:
            for each in (layer, twin):
                each.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(layer.keys, twin.keys)
        assert torch.equal(layer.values, twin.values)
    assert copies == 3  # at first, after the cut, and after the new order


def test_who_keeps_what_a_cache_held_keeps_it() -> None:
    layer = filled()
    write(layer, 1.0)
    kept, shallow, deep = layer.keys, copy.copy(layer), copy.deepcopy(layer)
    beginning = DynamicLayer()
    beginning.lazy_initialization(layer.keys, layer.values)
    beginning.keys, beginning.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    before = kept.clone()
    write(layer, 2.0)
    write(shallow, 3.0)
    write(deep, 4.0)
    write(beginning, 5.0)
    assert torch.equal(kept, before)
    for each, value in ((layer, 2.0), (shallow, 3.0), (deep, 4.0)):
        assert torch.equal(each.keys[:, :, :-1], before)
        assert torch.equal(each.keys[:, :, -1], torch.full((2, 3, 4), value))
        assert torch.equal(each.values[:, :, -1], torch.full((2, 3, 4), value))
    assert torch.equal(beginning.keys[:, :, :2], before[:, :, :2])


def test_other_layers_of_caches_have_no_room() -> None:
    assert one_more_column(DynamicLayer()) is None

    class Own(DynamicLayer):
        pass

    own = Own()
    own.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4))
    assert one_more_column(own) is None


def test_a_cache_whose_layers_differ_is_left_to_the_modules(
    model_of: Callable[..., PeerForCausalLM], calls: list[int]
) -> None:
    model, cache = model_of(ffw_layers="dense"), DynamicCache()
    with torch.no_grad():
        model(torch.randint(64, (1, 4)), past_key_values=cache)
        cache.layers[1].crop(-2)
        with pytest.raises(RuntimeError, match="size of tensor"):
            model(
                torch.randint(64, (1, 1)),
                past_key_values=cache,
                attention_mask=torch.tensor([[0, 1, 1, 1, 1]]),
            )
        cache = DynamicCache()
        model(torch.randint(64, (1, 4)), past_key_values=cache)
        cache.layers[1].values = cache.layers[1].values.double()
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.randint(64, (1, 1)), past_key_values=cache)
    assert calls == []
