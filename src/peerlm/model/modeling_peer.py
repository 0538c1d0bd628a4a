"""PeerForCausalLM: a decoder-only transformer whose blocks choose their kind of feed-forward layer.

Rotary positions and RMSNorm are Llama's, from transformers, and so is most of attention. What is here is the block,
which hands its feed-forward layer the mask of real tokens, and the initialisation.
"""

# ruff: noqa: RUF012, transformers declares its class settings as instance variables

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from peerlm.layers import DenseFFW, OutputGate, ParallelFFW, TokenChoiceMoE
from peerlm.layers.retrieval_layer import RetrievalLayer
from peerlm.layers.table import rows_drawn_again
from peerlm.model.attention import KeyValueShift, PeerAttention, previous_tokens, shares_of_previous
from peerlm.model.configuration_peer import CONFIGURABLE_KINDS, FFW_KINDS, PeerConfig, parts_of
from peerlm.model.one_token import OneToken
from peerlm.model.token_history import preceding_tokens
from peerlm.optim.saved import FILE, STALE, TABLES, catch_up_saved

logger = logging.get_logger(__name__)


class PeerEmbedding(nn.Embedding):
    """Embeddings of variance 1 / dim, scaled to unit mean square.

    The residual stream then begins at the scale of what blocks add to it, so that attention does not outweigh the
    token. The same matrix, tied to the output, gives logits of unit variance (as in Gemma).
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids (...) to (..., embedding_dim)."""
        return super().forward(input_ids) * self.embedding_dim**0.5


def build_ffw(config: PeerConfig, kind: str) -> nn.Module:
    """The feed-forward layer of a block of this kind, with the configuration's settings."""
    hidden = config.intermediate_size or 4 * config.hidden_size
    parts = parts_of(kind)
    if len(parts) == 1:
        return _build_part(config, kind, hidden)
    hidden = config.parallel_intermediate_size or hidden
    return ParallelFFW({part: _build_part(config, part, hidden) for part in parts})


def _build_part(config: PeerConfig, kind: str, hidden: int) -> nn.Module:
    if kind in CONFIGURABLE_KINDS:
        return FFW_KINDS[kind](config.hidden_size, **(getattr(config, kind) or {}))
    if kind == "swiglu":
        return DenseFFW(config.hidden_size, hidden=round(2 / 3 * hidden), activation="silu", gated=True)
    return DenseFFW(config.hidden_size, hidden=hidden)


class PeerDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + ffw(norm(x)), the latter times the factors of a gate if there is one.

    Attributes:
        ffw_scales: the output scale at the start of each feed-forward layer, by its path in the block.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PeerAttention(config, layer_idx)
        assert config.ffw_layers is not None  # filled in by PeerConfig
        with rows_drawn_again():  # by reset_ffw
            self.ffw = build_ffw(config, config.ffw_layers[layer_idx])
        scales = config.ffw_output_scales(layer_idx)
        self.ffw_scales = {"ffw" if len(scales) == 1 else f"ffw.{part}": scale for part, scale in scales.items()}
        self.ffw_gate = (
            None if config.ffw_output_gate is None else OutputGate(config.hidden_size, config.ffw_output_gate)
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map (batch, sequence, hidden_size); `token_mask` (batch, sequence) is True at real tokens.

        token_ids: (batch, sequence, n), each token's id and those before it, for layers that read them.
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        reads = getattr(self.ffw, "reads_tokens", 0)
        added = self.ffw(normed, token_mask, token_ids) if reads else self.ffw(normed, token_mask)
        return hidden_states + (added if self.ffw_gate is None else added * self.ffw_gate(normed))

    def reset_ffw(self) -> None:
        """Initialise each feed-forward layer at its output scale, unless a conversion has put another in its place."""
        for path, scale in self.ffw_scales.items():
            layer = self.get_submodule(path)
            if isinstance(layer, tuple(FFW_KINDS.values())):
                layer.reset_parameters(output_scale=scale)  # type: ignore[operator]


EARLIER_NAMES = {r"\.ffw\.values$": ".ffw.values.rows"}
"""Patterns of names that parameters had in earlier versions, and those that they have now."""


class PeerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config_class = PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PeerDecoderLayer,
        "attentions": PeerAttention,
    }

    def __init__(self, config: PeerConfig):
        self._supports_flash_attn = not config.attention_sink  # some of its versions leave sinks out and do not say so
        super().__init__(config)
        assert config.ffw_layers is not None  # filled in by PeerConfig
        # An expert chooses among all tokens of a call, and how many depends on the values of the mask.
        parts = {part for kind in config.ffw_layers for part in parts_of(kind)}
        self._can_compile_fullgraph = self._supports_context_parallel = "expert_choice" not in parts
        # The token before may be on another rank.
        self._supports_context_parallel &= not config.kv_shift and "hashed_ngrams" not in parts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As transformers loads a model; rows that were stale when a run saved a checkpoint are updated.

        Values of memories may have their name of earlier versions. Raises ValueError where rows are stale and the
        optimizer's state, by which they are updated, is not beside them; or tables are in files elsewhere.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if (folder / TABLES).is_file():
            raise ValueError(
                f"{folder} is a checkpoint whose tables are in files elsewhere, which later steps change: resume its "
                "run to the end, and load the run's model"
            )
        kwargs["key_mapping"] = EARLIER_NAMES | (kwargs.get("key_mapping") or {})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        # Without these transformers saves under the names of now.
        model._weight_conversions = [
            each for each in model._weight_conversions or () if not EARLIER_NAMES.keys() & set(each.source_patterns)
        ]
        if (folder / FILE).is_file():
            catch_up_saved(model, folder, prefix=f"{cls.base_model_prefix}.")
        elif getattr(model.config, STALE, False):
            raise ValueError(
                f"rows in {pretrained_model_name_or_path} are stale, as a run saved them between two steps: "
                f"put {FILE} of the same checkpoint beside them, or load the run's finished model"
            )
        vars(model.config).pop(STALE, None)
        return loaded

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise what was not loaded.

        For code outside of transformers, modules without parameters of their own are passed over, which would
        leave out feed-forward layers made of linear ones. Every initialisation here spares loaded weights, so
        that none must be.
        """
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices N(0, 1 / fan_in); what a block adds to the residual stream smaller by sqrt(2 * blocks)."""
        if isinstance(module, OutputGate):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, PeerAttention):
            init.normal_(module.o_proj.weight, std=self.config.residual_scale * module.o_proj.in_features**-0.5)
            if module.sinks is not None:
                init.zeros_(module.sinks)
        elif isinstance(module, KeyValueShift):
            spread = self.config.kv_shift_init == "spread"
            previous = shares_of_previous(len(module.key)) if spread else torch.zeros(len(module.key))
            init.copy_(module.key, 1 - previous)
            init.copy_(module.previous_key, previous)
            init.ones_(module.value)
            init.zeros_(module.previous_value)
        elif isinstance(module, PeerDecoderLayer):
            module.reset_ffw()
        else:
            super()._init_weights(module)


class PeerModel(PeerPreTrainedModel):
    """The transformer without its output matrix."""

    def __init__(self, config: PeerConfig):
        super().__init__(config)
        self.embed_tokens = PeerEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        owners: dict[type, RetrievalLayer] = {}
        for index in range(config.num_hidden_layers):
            block = PeerDecoderLayer(config, index)
            self.layers.append(block)
            for part in block.ffw.modules() if config.share_tables else ():
                if isinstance(part, RetrievalLayer) and owners.setdefault(type(part), part) is not part:
                    part.share_tables_of(owners[type(part)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Map tokens (batch, sequence) to hidden states (batch, sequence, hidden_size).

        `attention_mask` (batch, past + sequence) is 1 at real tokens; padding may stand on either side.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, exactly one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        sequence = inputs_embeds.shape[1]
        given_positions = position_ids
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + sequence, device=inputs_embeds.device)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # In these transformers looks for several texts in a row, and waits for the device to find none.
            position_ids=given_positions,
        )
        token_mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -sequence:].bool()
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        reads_tokens = max([getattr(layer.ffw, "reads_tokens", 0) for layer in self.layers])
        if self.config.kv_shift or reads_tokens:
            previous = previous_tokens(position_ids, attention_mask, past, self.rotary_emb)
            if self.config.kv_shift:
                kwargs["previous"] = previous
            if reads_tokens:
                kwargs["token_ids"] = self._token_ids(
                    input_ids, reads_tokens, previous.exists, past_key_values, kwargs.get("cache")
                )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                token_mask=token_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _token_ids(
        self, input_ids: Tensor | None, count: int, follows: Tensor, cache: Cache | None, paged: Any
    ) -> Tensor:
        if input_ids is None:
            raise ValueError("layers of n-grams look up by token ids: pass input_ids, not inputs_embeds")
        if paged is not None:
            raise ValueError(
                "paged caches, as of continuous batching, keep no token ids for layers of n-grams: generate with "
                "another cache"
            )
        return preceding_tokens(input_ids, count, follows, cache, len(self.layers))


class PeerForCausalLM(PeerPreTrainedModel, GenerationMixin):
    """The transformer with its output matrix, tied to the embeddings by default."""

    def _get_static_cache_init_shape(self) -> Any:
        """As in transformers, which makes a cache by it ahead of time; with shifted keys the first call makes it."""
        return None if self.config.kv_shift else super()._get_static_cache_init_shape()  # type: ignore[misc]

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PeerConfig):
        super().__init__(config)
        self.model = PeerModel(config)
        self._one_token = OneToken(PeerModel, PeerDecoderLayer)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where the embeddings are: transformers asks twice for each token, and goes through all parameters."""
        weight = getattr(self.model.embed_tokens, "weight", None)
        return weight.device if isinstance(weight, Tensor) else super().device

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits (batch, sequence, vocab_size), and the mean loss in nats if there are `labels`.

        Labels are shifted inside; -100 is ignored. In training `aux_loss` is the balance loss of token-choice layers,
        times its coefficient, and the loss includes it. With `num_items_in_batch`, the labels that all micro-batches
        and ranks of a step predict together, the loss is this micro-batch's share of the step's mean loss.

        Raises:
            ValueError: gradient checkpointing is reentrant, which keeps gradients from the balance loss.
        """
        if labels is None and inputs_embeds is None and isinstance(logits_to_keep, int):
            hidden_states = self._one_token.forward(
                self.model, input_ids, attention_mask, position_ids, past_key_values, kwargs
            )
            if hidden_states is not None:
                return MoeCausalLMOutputWithPast(logits=self.lm_head(hidden_states), past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss, balance_loss = None, self._balance_loss()
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if balance_loss is not None:
                loss = loss + balance_loss * _share_of_step(labels, **kwargs)
        elif balance_loss is not None and torch.is_grad_enabled():
            logger.warning_once(
                "Without labels, as with label smoothing, the caller's loss lacks the balance loss of token-choice "
                "layers. Add `outputs.aux_loss` to it, or set balance_loss_coefficient to 0."
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _balance_loss(self) -> Tensor | None:
        """The mean over token-choice layers times its coefficient; None where there is none to train with."""
        if not self.training:
            return None  # and no look through all modules for each token
        layers = [
            module
            for module in self.modules()
            if isinstance(module, TokenChoiceMoE) and module.balance_loss is not None
        ]
        if not layers or not self.config.balance_loss_coefficient:
            return None
        losses = torch.stack([layer.balance_loss for layer in layers])  # type: ignore[misc]
        trained = any(layer.router.weight.requires_grad for layer in layers)
        if trained and torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError(
                "reentrant gradient checkpointing keeps gradients from the balance loss of token-choice layers: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return self.config.balance_loss_coefficient * losses.mean()


def _share_of_step(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor | float:
    """How much of a step's loss this micro-batch is: of the labels that the step predicts, those here; 1 if unknown."""
    if num_items_in_batch is None:
        return 1.0
    predicted = labels[..., 1:] if shift_labels is None else shift_labels
    return (predicted != ignore_index).sum() / num_items_in_batch
