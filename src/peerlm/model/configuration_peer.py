"""PeerConfig: the settings of a language model of PEER blocks, dense blocks and baselines."""

import math
from collections import Counter
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from peerlm.layers import (
    PEER,
    DenseFFW,
    ExpertChoiceMoE,
    FineGrainedMoE,
    HashedNgrams,
    ProductKeyMemory,
    TokenChoiceMoE,
)
from peerlm.layers.checks import check_settings
from peerlm.layers.output_gate import GATES
from peerlm.layers.parallel import share_of_scale
from peerlm.layers.retrieval_layer import RetrievalLayer
from peerlm.names import MODEL_TYPE

# Kind of feed-forward layer -> its class. "dense" and "swiglu" take their size from `intermediate_size`, the
# others their keyword arguments from the configuration field of the same name.
FFW_KINDS: dict[str, type] = {
    "dense": DenseFFW,
    "swiglu": DenseFFW,
    "peer": PEER,
    "pkm": ProductKeyMemory,
    "expert_choice": ExpertChoiceMoE,
    "token_choice": TokenChoiceMoE,
    "fine_grained_moe": FineGrainedMoE,
    "hashed_ngrams": HashedNgrams,
}
CONFIGURABLE_KINDS = ("peer", "pkm", "expert_choice", "token_choice", "fine_grained_moe", "hashed_ngrams")
INNER = ":inner"
"""Ends the name of a kind of which a quarter of the blocks at either end have none."""
BESIDE = "+"
"""Stands between the names of layers that are beside each other in a block."""
SHIFT_INITS = ("none", "spread")
"""Names of where the weights of shifted keys and values start."""


def kinds_of_blocks(ffw_layers: str | list[str] | None, blocks: int) -> list[str]:
    """The kind of feed-forward layer in each of the blocks, of what `PeerConfig.ffw_layers` may be."""
    if ffw_layers is None:
        return ["peer" if block == blocks // 2 else "dense" for block in range(blocks)]
    if isinstance(ffw_layers, list):
        return ffw_layers
    outer = blocks // 4 if ffw_layers.endswith(INNER) else 0
    kind = ffw_layers.removesuffix(INNER)
    return [kind if outer <= block < blocks - outer else "dense" for block in range(blocks)]


def parts_of(kind: str) -> list[str]:
    """The kinds of the layers that are summed in a block of this kind, which may be one."""
    return kind.split(BESIDE)


@strict
class PeerConfig(PreTrainedConfig):
    r"""Configuration of `PeerModel` and `PeerForCausalLM`.

    Args:
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads (as many if None).
        head_dim: size of a head (hidden_size / num_attention_heads if None).
        intermediate_size: hidden neurons of dense layers (4 * hidden_size if None; for "swiglu", 2/3 of
            that).
        max_position_embeddings: longest context.
        ffw_layers: kind of feed-forward layer in each block: a list, or one kind for all blocks. "peer:inner" has PEER
            in the inner blocks and dense layers in the first and the last quarter, which is best in
            recipes/ablations/blocks.toml (any kind can be named so; less than four blocks all have it). None puts PEER
            in the middle block and dense layers in the others, as He 2024. Kinds: "dense" (GELU), "swiglu", "peer",
            "pkm", "expert_choice", "token_choice", "fine_grained_moe", "hashed_ngrams". Names joined by "+", such as
            "peer+dense", are layers beside each other: each maps the same input, and their outputs are summed.
        parallel_intermediate_size: hidden neurons of dense layers that are beside another ("peer+dense"), as
            intermediate_size of those that are alone (and that if None).
        peer, pkm, expert_choice, token_choice, fine_grained_moe, hashed_ngrams: keyword arguments of `PEER`,
            `ProductKeyMemory`, `ExpertChoiceMoE`, `TokenChoiceMoE`, `FineGrainedMoE`, `HashedNgrams`.
        share_tables: whether all blocks of a kind that has a table ("peer", "pkm") look rows up in one, which the first
            of them owns, each by its own index.
        balance_loss_coefficient: weight of the load-balancing loss that token-choice layers add in training.
        ffw_init_scale: output scale of feed-forward layers at the start, relative to the rule of `layers.output_scale`
            over sqrt(2 * num_hidden_layers): one number, a list with one for each block, or a dict with one for each
            kind. The default is the best of recipes/tune.toml, for every kind of layer; with the settings of the preset
            "tuned" PEER has 1. Of n layers beside each other
            each starts at 1 / sqrt(n) of its number, so that their sum has the scale of one.
        ffw_output_gate: None, or what the output of each feed-forward layer has factors for, which are learned and 1 at
            the start: "token" or "feature" (`OutputGate`).
        qk_norm: whether attention norms the queries and keys of each head (RMSNorm, as in Qwen3).
        kv_shift: whether attention mixes each key and value with that of the token before, by learned weights of each
            head (`KeyValueShift`).
        kv_shift_init: where these start. "none": no mix. "spread": keys from a token's own in the first head to that
            of the token before in the last, so that a model copies from its context earlier; PEER then learns less of
            what is not copied (docs/frontier.md).
        attention_sink: whether each head of attention has a learned logit to which no value belongs, 0 at the start, so
            that it can attend to nothing (as in gpt-oss).
        rms_norm_eps, rope_parameters, attention_bias, attention_dropout, tie_word_embeddings, use_cache: as
            in LlamaConfig.

    With peer=None the middle block has `PEER`'s own 1,048,576 experts: 2.1 GB at the default width of 256 in float32.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a setting is impossible, or has a value of another type; its cause
            has the setting, its value, and the fix.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    parallel_intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    ffw_layers: str | list[str] | None = None
    peer: dict[str, Any] | None = None
    pkm: dict[str, Any] | None = None
    expert_choice: dict[str, Any] | None = None
    token_choice: dict[str, Any] | None = None
    fine_grained_moe: dict[str, Any] | None = None
    hashed_ngrams: dict[str, Any] | None = None
    share_tables: bool = False
    balance_loss_coefficient: float | int = 0.01
    ffw_init_scale: float | int | list[float | int] | dict[str, float | int] = 3.0
    ffw_output_gate: str | None = None
    qk_norm: bool = False
    kv_shift: bool = False
    kv_shift_init: str = "none"
    attention_sink: bool = False
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)  # 0 is refused below
        if self.ffw_layers is None or isinstance(self.ffw_layers, str):
            self.ffw_layers = kinds_of_blocks(self.ffw_layers, self.num_hidden_layers)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse settings that no model can be built from; called by the configuration itself."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "parallel_intermediate_size",
            "max_position_embeddings",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        assert self.num_key_value_heads is not None  # these three are filled in by __post_init__
        assert self.head_dim is not None
        assert isinstance(self.ffw_layers, list)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; "
                f"it must divide num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary positions need an even number of at least 2: "
                f"set hidden_size = {self.hidden_size} to an even multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if len(self.ffw_layers) != self.num_hidden_layers:
            raise ValueError(
                f"ffw_layers names {len(self.ffw_layers)} blocks; num_hidden_layers is "
                f"{self.num_hidden_layers}: name each, or give one kind for all"
            )
        for kind in self.ffw_layers:
            parts = parts_of(kind)
            for part in parts:
                if part not in FFW_KINDS:
                    raise ValueError(f"ffw_layers has {part!r}; choose from {', '.join(FFW_KINDS)}")
            if len(set(parts)) < len(parts):
                raise ValueError(f"ffw_layers has {kind!r}; a layer can be beside those of other kinds only")
        with_tables = [part for part in FFW_KINDS if issubclass(FFW_KINDS[part], RetrievalLayer)]
        blocks_of = Counter(part for kind in self.ffw_layers for part in parts_of(kind) if part in with_tables)
        if self.share_tables and max(blocks_of.values(), default=0) < 2:
            raise ValueError(
                f"share_tables is true, but no two blocks of ffw_layers have the same of {', '.join(with_tables)}; "
                "name such a kind twice, or leave share_tables out"
            )
        beside_dense = any(
            len(parts := parts_of(kind)) > 1 and {"dense", "swiglu"} & {*parts} for kind in self.ffw_layers
        )
        if self.parallel_intermediate_size is not None and not beside_dense:
            raise ValueError(
                f"parallel_intermediate_size is {self.parallel_intermediate_size}, but no block of ffw_layers has a "
                'dense layer beside another, such as "peer+dense": name one, or leave it out'
            )
        if self.ffw_output_gate not in (None, *GATES):
            raise ValueError(f"ffw_output_gate is {self.ffw_output_gate!r}; choose one of {', '.join(GATES)}, or None")
        if self.kv_shift_init not in SHIFT_INITS:
            raise ValueError(f"kv_shift_init is {self.kv_shift_init!r}; choose one of {', '.join(SHIFT_INITS)}")
        if self.kv_shift_init != "none" and not self.kv_shift:
            raise ValueError(
                f"kv_shift_init is {self.kv_shift_init!r}, but kv_shift is false: set that to true, "
                "or leave kv_shift_init out"
            )
        self._check_init_scale()
        for kind in CONFIGURABLE_KINDS:
            check_settings(FFW_KINDS[kind], kind, getattr(self, kind) or {})

    def _check_init_scale(self) -> None:
        given, blocks = self.ffw_init_scale, self.ffw_layers
        assert isinstance(blocks, list)  # filled in by __post_init__
        if isinstance(given, list) and len(given) != len(blocks):
            raise ValueError(
                f"ffw_init_scale has {len(given)} numbers; num_hidden_layers is {len(blocks)}: give one for each block"
            )
        if isinstance(given, dict):
            used = dict.fromkeys(part for kind in blocks for part in parts_of(kind))
            for kind in given:
                if kind not in FFW_KINDS:
                    raise ValueError(f"ffw_init_scale names {kind!r}; choose from {', '.join(FFW_KINDS)}")
            for kind in used:
                if kind not in given:
                    raise ValueError(f"ffw_init_scale has no number for {kind!r}, which ffw_layers has; add it")
        numbers = given if isinstance(given, list) else given.values() if isinstance(given, dict) else [given]
        for number in numbers:
            if not 0 <= number < math.inf:
                raise ValueError(f"ffw_init_scale has {number}; give finite numbers of at least 0")

    @property
    def residual_scale(self) -> float:
        """By what the layers that write to the residual stream start smaller, so that its scale does not grow."""
        return float((2 * self.num_hidden_layers) ** -0.5)

    def ffw_output_scales(self, block: int) -> dict[str, float]:
        """What each of the layers that are summed in a block starts at, by its kind, as `reset_parameters` takes it."""
        given, kinds = self.ffw_init_scale, self.ffw_layers
        assert isinstance(kinds, list)  # filled in by __post_init__
        parts = parts_of(kinds[block])
        if isinstance(given, dict):
            scales = {part: given[part] for part in parts}
        else:
            scales = dict.fromkeys(parts, given[block] if isinstance(given, list) else given)
        share = self.residual_scale * share_of_scale(len(parts))
        return {part: scale * share for part, scale in scales.items()}
