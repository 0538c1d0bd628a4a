"""Attention of a block: Llama's, with normed queries and keys, shifted keys and values, and a sink as options.

Shape suffixes: B batch, H query heads, G key and value heads, S new tokens, K tokens attended to, C head_dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from peerlm.model.configuration_peer import PeerConfig

SINK_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Names that transformers gives the implementations of attention that take a sink."""


class Previous(NamedTuple):
    """What a shift of keys and values needs to know of the new tokens."""

    exists: Tensor
    """(B or 1, S) bool: whether the token before is in the slot before. It is not at the start of a text, also of one
    of several that are packed, and not behind padding."""
    cos: Tensor
    """(C,), of the rotation by one position."""
    sin: Tensor
    """(C,), likewise."""


def previous_tokens(
    position_ids: Tensor, attention_mask: Any, past: int | Tensor, rotary: LlamaRotaryEmbedding
) -> Previous:
    """What is known of the tokens before the new ones.

    Args:
        position_ids: (B or 1, S); a token whose position does not follow that of the one before begins a text.
        attention_mask: as the model takes it: (B, past + S), or (B, 1 or H, S, K) bool or added to scores; or None. A
            BlockMask says nothing here, so that positions alone tell where a text begins.
        past: tokens in the cache.
        rotary: has been called with these positions.
    """
    exists = torch.cat(
        [position_ids[:, :1] > 0, position_ids[:, 1:] == position_ids[:, :-1] + 1],
        dim=1,
    )
    new = position_ids.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        exists = exists & F.pad(attention_mask.bool(), (1, 0))[:, -new - 1 : -1]
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        before = (past + torch.arange(new, device=position_ids.device) - 1).clamp(min=0)
        seen = attention_mask[:, 0].gather(-1, before[None, :, None].expand(len(attention_mask), -1, 1))[..., 0]
        exists = exists & (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2)
    angles = torch.cat([rotary.inv_freq, rotary.inv_freq])
    return Previous(exists, angles.cos(), angles.sin())


class KeyValueShift(nn.Module):
    """Each key and value becomes a learned mix of itself and that of the token before (KV-shift; arXiv 2411.19574).

    Every head has its own four weights. Here they are 1 and 0, no shift; a model starts them as its configuration says.

    Attributes:
        key, value: (G,), weights of a token's own.
        previous_key, previous_value: (G,), weights of that of the token before.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.key, self.value = (nn.Parameter(torch.ones(heads)) for _ in range(2))
        self.previous_key, self.previous_value = (nn.Parameter(torch.zeros(heads)) for _ in range(2))

    def forward(self, key: Tensor, value: Tensor, exists: Tensor, previous: Previous) -> tuple[Tensor, Tensor]:
        """Mix keys, rotated for their own positions, and values (B, G, K, C); exists (B or 1, 1 or G, K, 1).

        That of the token before has been rotated for its own position, one less, and is rotated on by one.
        """
        cos, sin = (each.to(key.dtype) for each in (previous.cos, previous.sin))
        before = _shifted(key)
        before = before * cos + rotate_half(before) * sin
        exists = exists.to(key.dtype)
        mixed_key = _per_head(self.key) * key + _per_head(self.previous_key) * (exists * before)
        mixed_value = _per_head(self.value) * value + _per_head(self.previous_value) * (exists * _shifted(value))
        return mixed_key.to(key.dtype), mixed_value.to(value.dtype)


def shares_of_previous(heads: int) -> Tensor:
    """How much of the token before is in the keys of each head (G,), from 0 to 1; of a single one, half."""
    return torch.linspace(0, 1, heads) if heads > 1 else torch.full((heads,), 0.5)


def _shifted(states_BGKC: Tensor) -> Tensor:
    return F.pad(states_BGKC[:, :, :-1], (0, 0, 1, 0))


def _per_head(weight_G: Tensor) -> Tensor:
    return weight_G[:, None, None]


class PeerAttention(LlamaAttention):
    """Llama's attention with the options of `PeerConfig`, which also states its cost.

    Attributes:
        q_norm, k_norm: RMSNorm of each head before the rotation, as in Qwen3; or nothing.
        shift: `KeyValueShift`, or None.
        sinks: (H,), a logit of each head to which no value belongs, as in gpt-oss; or None.
    """

    sinks: nn.Parameter | None

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        self.q_norm, self.k_norm = (
            LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        assert config.num_key_value_heads is not None  # filled in by PeerConfig
        self.shift = KeyValueShift(config.num_key_value_heads) if config.kv_shift else None
        sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sink else None
        self.register_parameter("sinks", sinks)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        previous: Previous | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, S, hidden_size); what the implementation of attention gives as weights comes second.

        A cache holds keys and values before they are mixed, and with each key whether it has one before it. So
        whatever a cache does to its tokens (cut, reorder, repeat), the mix is right.
        """
        if (self.shift is not None or self.sinks is not None) and kwargs.get("cache") is not None:
            raise ValueError(
                "paged caches, as of continuous batching, keep keys for attention without a shift or a sink; generate "
                "with another cache, or set kv_shift and attention_sink to false before training"
            )
        shape = hidden_states.shape[:-1]
        by_head = (*shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        exists = None
        if self.shift is not None:
            assert previous is not None  # the model gives it to all blocks
            exists = previous.exists[:, None, :, None]
            if past_key_values is not None:
                key = torch.cat([key, exists.to(key.dtype).expand(*key.shape[:-1], 1)], dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.shift is not None and exists is not None and previous is not None:
            if past_key_values is not None:
                key, exists = key[..., :-1], key[..., -1:]
            key, value = self.shift(key, value, exists, previous)
        name = self.config._attn_implementation
        eager = eager_attention_forward
        if self.sinks is not None:
            if name not in SINK_IMPLEMENTATIONS:
                raise ValueError(
                    f"attn_implementation is {name!r}, which has no sink; choose one of "
                    f"{', '.join(SINK_IMPLEMENTATIONS)}"
                )
            eager = eager_with_sinks
            if name == "sdpa":
                key, value, attention_mask = _with_sink_as_token(query, key, value, attention_mask, self.sinks)
            else:
                kwargs["s_aux"] = self.sinks
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # a name of its own: vLLM looks for such a call
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*shape, -1).contiguous()), weights

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of scores and mixing over the full context; the four maps count themselves."""
        return 4 * context * self.config.num_attention_heads * self.head_dim


def _with_sink_as_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks_H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask with one token more, whose score is the sink and whose value is zero.

    PyTorch's scaled dot product attention has no sinks. The mask is (B or 1, H, S, K + 1), added to scores.
    """
    new, attended = query.shape[2], key.shape[2]
    if mask is None:  # as transformers leaves it out: one token that sees all, or S = K causal ones
        allowed = torch.ones(new, attended, dtype=torch.bool, device=query.device)
        mask = (allowed.tril() if new > 1 else allowed)[None, None]
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    heads = len(sinks_H)
    sink = sinks_H.to(query.dtype).view(1, heads, 1, 1).expand(len(mask), heads, new, 1)
    mask = torch.cat([mask.to(query.dtype).expand(-1, heads, -1, -1), sink], dim=-1)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), mask
