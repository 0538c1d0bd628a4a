"""One new token of each of a few sequences through a model's blocks, attention in one call of a backend for each."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from peerlm.layers.one_call import nobody_looks_on, where
from peerlm.model.attention import PeerAttention
from peerlm.model.cache_room import keep, one_more_column
from peerlm.ops import api
from peerlm.ops.attention_step import AddedNorm, AttentionStep, Layer, RMSNorm, Step, Through

MOST_ROWS = 8
"""Sequences; of more, attention is quicker as products of matrices."""
_IMPLEMENTATIONS = ("eager", "sdpa")
"""Names of attention that one call stands for."""
_SETTINGS = ("scaling", "variance_epsilon", "attention_scaling", "shift")
"""Attributes of modules that are neither modules nor weights."""
_CHANGING_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the length."""


class OneToken:
    """The calls of a model's blocks, made ready when first needed, and again when the model has changed.

    Copies and pickles have none.

    Args:
        model, block: classes whose `forward` is what the calls stand for.
    """

    def __init__(self, model: type[nn.Module], block: type[nn.Module]) -> None:
        self._kinds = (model, block)
        self._of: _Depends | None = None
        self._steps: list[Step] | None = None
        self._last_norm: AddedNorm | None = None
        self._calls: list[Layer] = []
        self._through: Through | None = None

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
        if len(cache.layers) < len(model.layers) or not self._ready(model):
            return None
        rooms = [room for layer in cache.layers[: len(model.layers)] if (room := one_more_column(layer)) is not None]
        if len(rooms) < len(model.layers) or len({(each.shape, each.dtype) for room in rooms for each in room}) > 1:
            return None
        assert self._steps is not None
        assert self._last_norm is not None
        positions = torch.tensor([[cache.get_seq_length()]]) if position_ids is None else position_ids.contiguous()
        mask = None if attention_mask is None else attention_mask.long().contiguous()
        hidden = model.embed_tokens(input_ids).clone(memory_format=torch.contiguous_format)
        through = self._all_blocks(model)
        if through is not None:
            found = through(hidden, rooms, mask, positions)
            for layer, room in zip(cache.layers if found is not None else (), rooms, strict=False):
                keep(layer, *room)
            return found
        added = None
        for block, step, layer, room in zip(model.layers, self._steps, cache.layers, rooms, strict=False):
            normed = step(hidden, added, *room, mask, positions)
            if normed is None:
                assert added is None  # what differs between blocks was asked for before
                return None
            keep(layer, *room)
            added = block.ffw(normed)
            if block.ffw_gate is not None:
                added = added * block.ffw_gate(normed)
            added = added.to(hidden.dtype).expand_as(hidden).contiguous()
        return self._last_norm(hidden, added)

    def _all_blocks(self, model: Any) -> Through | None:
        """What passes a token through all blocks in one call; None where a layer has no such call, or is looked at."""
        calls = []
        for block in model.layers:
            layer = block._modules["ffw"]
            made = getattr(layer, "few_tokens_call", None)
            call = None if made is None or block.ffw_gate is not None or not nobody_looks_on(layer) else made()
            if call is None:
                return None
            calls.append(call)
        if self._calls != calls:
            assert self._steps is not None
            assert self._last_norm is not None
            self._through, self._calls = api.through_blocks(self._steps, calls, self._last_norm), calls
        return self._through

    def _ready(self, model: Any) -> bool:
        """Whether the blocks are as `PeerModel` made them and nothing else looks on; their calls are made ready."""
        if self._of is None or not self._of.holds():
            self._steps, self._calls = None, []
            self._of = _Depends(model, *self._kinds)
            if self._of.as_made:
                self._last_norm = api.added_norm(_norm(model.norm))
                steps = [api.attention_step(_step_of(block, model.rotary_emb)) for block in model.layers]
                if self._last_norm is not None and None not in steps:
                    self._steps = [step for step in steps if step is not None]
        return self._steps is not None and nobody_looks_on() and not any(self._of.hooks)


class _Depends:
    """What the calls of a model's blocks depend on, and whether it still is what it was.

    Attributes:
        as_made: whether the blocks have the modules that the calls stand for, without options that these have not.
        hooks: the hooks of all these modules.
    """

    def __init__(self, model: Any, model_kind: type[nn.Module], block_kind: type[nn.Module]):
        self.hooks: list[dict[int, Any]] = []
        self._links: list[tuple[dict[str, Any], str, object]] = []
        self._kinds: list[tuple[nn.Module, type[nn.Module]]] = []
        self._tensors: list[Tensor] = []
        self.as_made = self._own(model, (model_kind,), "rotary_emb", "norm", "layers")
        settings = vars(model.config)
        for name in ("_attn_implementation_internal", "output_hidden_states", "_output_attentions"):
            self._links.append((settings, name, settings.get(name)))
        rotary = model.rotary_emb
        self.as_made &= settings.get("_attn_implementation_internal") in _IMPLEMENTATIONS
        self.as_made &= not (settings.get("output_hidden_states") or settings.get("_output_attentions"))
        self.as_made &= self._own(rotary, (LlamaRotaryEmbedding,)) and self._own(model.norm, (LlamaRMSNorm,))
        self.as_made &= self.as_made and not any(each in rotary.rope_type for each in _CHANGING_ROTATIONS)
        self._own(model.layers, (nn.ModuleList,))
        for block in model.layers:
            if not self.as_made:
                break
            attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
            self.as_made = self._own(block, (block_kind,)) and self._own(attention, (PeerAttention,))
            self.as_made &= all(self._own(each, (LlamaRMSNorm,)) for each in norms)
            for name, part in attention._modules.items():
                kinds = (nn.Linear,) if name.endswith("_proj") else (nn.Identity, LlamaRMSNorm)
                self.as_made &= self._own(part, kinds) and getattr(part, "bias", None) is None
            if self.as_made:
                self.as_made = attention.shift is None and attention.sinks is None
                self.as_made &= not getattr(block.ffw, "reads_tokens", 0)
        self._where = where(self._tensors)

    def holds(self) -> bool:
        """Whether modules, settings and weights are those of then, and weights where they were."""
        for owner, name, value in self._links:
            if owner.get(name) is not value:
                return False
        return all(type(module) is kind for module, kind in self._kinds) and where(self._tensors) == self._where

    def _own(self, module: nn.Module, kinds: tuple[type[nn.Module], ...], *names: str) -> bool:
        """Depend on a module, or on these parts of it alone; whether it is of one of the kinds."""
        own = vars(module)
        self._kinds.append((module, type(module)))
        self._links.append((own, "forward", own.get("forward")))
        for part in (module._modules, module._parameters, module._buffers):
            for name, value in part.items():
                if not names or name in names:
                    self._links.append((part, name, value))
                    self._tensors += [value] if isinstance(value, Tensor) else []
        for name in _SETTINGS:
            self._links += [(own, name, own[name])] if name in own else []
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        return type(module) in kinds and "forward" not in own


def _step_of(block: Any, rotary: LlamaRotaryEmbedding) -> AttentionStep:
    attention = block.self_attn
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
    )


def _norm(module: Any) -> RMSNorm:
    return RMSNorm(weight=module.weight, epsilon=module.variance_epsilon)
