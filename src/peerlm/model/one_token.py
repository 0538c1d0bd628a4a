"""One new token of each of a few sequences through a model's blocks, attention in one call of a backend for each."""

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from peerlm.layers.one_call import Unchanged, nobody_looks_on
from peerlm.model.attention import KeyValueShift, PeerAttention
from peerlm.model.cache_room import keep, one_more_column
from peerlm.ops import api
from peerlm.ops.attention_step import AddedNorm, AttentionStep, RMSNorm, Shift, Step, Through

MOST_ROWS = 32
"""Sequences; of more, attention is quicker as products of matrices."""
_IMPLEMENTATIONS = ("eager", "sdpa")
"""Names of attention that one call stands for."""
_CHANGING_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the length."""


class _Made(NamedTuple):
    """Calls, and what they depend on."""

    of: Unchanged
    steps: list[Step] | None
    """Of each block's attention; None where the model has what these do not do."""
    last_norm: AddedNorm | None


class OneToken:
    """The calls of a model's blocks, made ready when first needed, and again when the model has changed.

    Copies and pickles have none.

    Args:
        model, block: classes whose `forward` is what the calls stand for.
    """

    def __init__(self, model: type[nn.Module], block: type[nn.Module]) -> None:
        self._kinds = (model, block)
        # Each is replaced as a whole: threads may share a model.
        self._made: _Made | None = None
        self._whole: tuple[_Made, Unchanged, Through] | None = None

    def __reduce__(self) -> tuple[type["OneToken"], tuple[type[nn.Module], ...]]:
        """As one that has no calls yet."""
        return OneToken, self._kinds

    def forward(
        self,
        model: Any,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None,
        others: dict[str, Any],
    ) -> Tensor | None:
        """What `PeerModel` makes of one new token of each sequence, (B, 1, hidden_size), but for rounding.

        None, and nothing is changed, where there are gradients, more tokens or sequences, hooks, other attention or
        weights, or a cache that has no room to write in; the model then calls its modules one after another.
        """
        if torch.compiler.is_compiling() or model.training or input_ids is None or cache is None:
            return None
        if input_ids.shape[1:] != (1,) or not 0 < len(input_ids) <= MOST_ROWS or getattr(cache, "offloading", False):
            return None
        if any(value is not None and value is not False for value in others.values()):
            return None
        if not (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2)):
            return None
        if len(cache.layers) < len(model.layers) or not nobody_looks_on():
            return None
        made = self._ready(model)
        if made.steps is None or made.last_norm is None or any(made.of.hooks):
            return None
        rooms = [room for layer in cache.layers[: len(model.layers)] if (room := one_more_column(layer)) is not None]
        if len(rooms) < len(model.layers):
            return None
        positions = torch.tensor([[cache.get_seq_length()]]) if position_ids is None else position_ids.contiguous()
        mask = None if attention_mask is None else attention_mask.long().contiguous()
        hidden = model.embed_tokens(input_ids).clone(memory_format=torch.contiguous_format)
        through = self._all_blocks(model, made)
        if through is not None:
            found = through(hidden, rooms, mask, positions)
            for layer, room in zip(cache.layers if found is not None else (), rooms, strict=False):
                keep(layer, *room)
            return found
        if any(len({(each.shape, each.dtype) for each in parts}) > 1 for parts in zip(*rooms, strict=True)):
            return None
        added = None
        for block, step, layer, room in zip(model.layers, made.steps, cache.layers, rooms, strict=False):
            normed = step(hidden, added, *room, mask, positions)
            if normed is None:
                assert added is None  # what differs between blocks was asked for before
                return None
            keep(layer, *room)
            added = block.ffw(normed)
            if block.ffw_gate is not None:
                added = added * block.ffw_gate(normed)
            added = added.to(hidden.dtype).expand_as(hidden).contiguous()
        return made.last_norm(hidden, added)

    def _ready(self, model: Any) -> _Made:
        """Calls of the blocks as they are now."""
        made = self._made
        if made is None or not made.of.holds():
            of, steps, last_norm = Unchanged(), None, None
            widths = {block.input_layernorm.weight.shape for block in model.layers} | {model.norm.weight.shape}
            if len(widths) == 1 and _depends(of, model, *self._kinds):
                last_norm = api.added_norm(_norm(model.norm))
                try:
                    found = [api.attention_step(_step_of(block, model.rotary_emb)) for block in model.layers]
                except ValueError:  # weights of other shapes: modules broadcast them, or say what is wrong
                    found = [None]
                steps = None if None in found else [step for step in found if step is not None]
            self._made = made = _Made(of, steps, last_norm)
        return made

    def _all_blocks(self, model: Any, made: _Made) -> Through | None:
        """What passes a token through all blocks in one call; None where a layer has no such call, or is looked at."""
        whole = self._whole
        if whole is not None:
            of, layers, through = whole
            if of is made and layers.holds():
                return None if any(layers.hooks) else through
        self._whole = None
        calls, layers = [], Unchanged()
        for block in model.layers:
            call_of = getattr(block.ffw, "few_tokens_call", None)
            call = None
            if call_of is not None and block.ffw_gate is None and nobody_looks_on(block.ffw):
                call = call_of()
            if call is None:
                return None
            calls.append(call)
            layers.add_all_of(block.ffw)
        assert made.steps is not None
        assert made.last_norm is not None
        found = api.through_blocks(made.steps, calls, made.last_norm)
        if found is not None:
            self._whole = made, layers, found
        return found


def _depends(unchanged: Unchanged, model: Any, model_kind: type[nn.Module], block_kind: type[nn.Module]) -> bool:
    """Let what the calls of blocks depend on be watched; whether the model has the modules that they stand for."""
    as_made = unchanged.add(model, "rotary_emb", "norm", "layers") is model_kind
    settings = vars(model.config)
    for name in ("_attn_implementation_internal", "output_hidden_states", "_output_attentions"):
        unchanged.link(settings, name)
    rotary = model.rotary_emb
    as_made &= settings.get("_attn_implementation_internal") in _IMPLEMENTATIONS
    as_made &= not (settings.get("output_hidden_states") or settings.get("_output_attentions"))
    as_made &= unchanged.add(rotary) is LlamaRotaryEmbedding and unchanged.add(model.norm) is LlamaRMSNorm
    unchanged.add(model.layers)
    if not as_made or any(each in rotary.rope_type for each in _CHANGING_ROTATIONS):
        return False
    for block in model.layers:
        if unchanged.add(block) is not block_kind or unchanged.add(block.self_attn) is not PeerAttention:
            return False
        attention = block.self_attn
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            as_made &= unchanged.add(norm) is LlamaRMSNorm
        for name, part in attention._modules.items():
            if part is not None and name != "shift":
                kinds = (nn.Linear,) if name.endswith("_proj") else (nn.Identity, LlamaRMSNorm)
                as_made &= unchanged.add(part) in kinds and getattr(part, "bias", None) is None
        shift = attention.shift
        as_made &= shift is None or (unchanged.add(shift) is KeyValueShift and _has_its_weights(shift))
        as_made &= attention.sinks is None and not getattr(block.ffw, "reads_tokens", 0)
    return as_made


def _has_its_weights(shift: KeyValueShift) -> bool:
    """Whether its weights are what it was made with: pruning, for one, gives them other names."""
    weights = shift._parameters
    return set(weights) == {field.name for field in fields(Shift)} and all(
        isinstance(w, Tensor) for w in weights.values()
    )


def _step_of(block: Any, rotary: LlamaRotaryEmbedding) -> AttentionStep:
    attention, shift = block.self_attn, block.self_attn.shift
    return AttentionStep(
        before=_norm(block.input_layernorm),
        after=_norm(block.post_attention_layernorm),
        query_map=attention.q_proj.weight,
        key_map=attention.k_proj.weight,
        value_map=attention.v_proj.weight,
        output_map=attention.o_proj.weight,
        query_norm=_norm(attention.q_norm) if isinstance(attention.q_norm, LlamaRMSNorm) else None,
        key_norm=_norm(attention.k_norm) if isinstance(attention.k_norm, LlamaRMSNorm) else None,
        frequencies=rotary.inv_freq,
        rotation_scale=rotary.attention_scaling,
        scaling=attention.scaling,
        shift=None if shift is None else Shift(**shift._parameters),
    )


def _norm(module: Any) -> RMSNorm:
    return RMSNorm(weight=module.weight, epsilon=module.variance_epsilon)
