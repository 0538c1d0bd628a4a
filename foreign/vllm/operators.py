"""Stand-ins in PyTorch for the seven of vLLM's own operators that a small model on a CPU calls.

vLLM without its compiled part has none of them. They compute what vLLM's kernels do, plainly and slowly. The
environment that `run.py` makes has this file as `vllm._C`, which vLLM imports in each of its processes.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_LIBRARY = torch.library.Library("_C", "FRAGMENT")


def _operator(schema: str, function: object) -> None:
    _LIBRARY.define(schema)
    _LIBRARY.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")


def _nothing(node_ids: list[int]) -> None:
    """Memory of a node of the machine: the system's choice is kept."""


def _no_plan(
    num_req: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    seq_lens: Tensor,
    dtype: torch.dtype,
    query_start_loc: Tensor,
    causal: bool,
    window_size: int,
    isa_hint: str,
    enable_kv_split: bool,
    dynamic_causal: Tensor | None,
    kv_cache_dtype: str = "auto",
) -> Tensor:
    """How the kernel is to share its work; ours needs no plan."""
    return torch.empty(0, dtype=torch.uint8)


def _slots(
    query_start_loc: Tensor, positions: Tensor, block_table: Tensor, slot_mapping: Tensor, block_size: int
) -> None:
    """Where in the cache each token goes."""
    starts = query_start_loc.tolist()
    for row, (first, last) in enumerate(itertools.pairwise(starts)):
        place = positions[first:last]
        slot_mapping[first:last] = block_table[row, place // block_size].long() * block_size + place % block_size


def _store(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    isa: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """Keys and values (tokens, heads, size) into caches (blocks, heads, slots, size)."""
    slots = slot_mapping[: len(key)]
    real = slots >= 0
    block, slot = slots[real] // key_cache.shape[2], slots[real] % key_cache.shape[2]
    key_cache[block, :, slot] = key[: len(slots)][real]
    value_cache[block, :, slot] = value[: len(slots)][real]


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    sliding_window_size: int,
    block_table: Tensor,
    softcap: float,
    scheduler_metadata: Tensor,
    s_aux: Tensor | None,
    dynamic_causal: Tensor | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    """Attention of each sequence's new tokens (tokens, heads, size) to its part of the caches."""
    for what, given in {
        "slopes": alibi_slopes is not None,
        "a window": sliding_window_size >= 0,
        "a soft cap": softcap != 0,
        "sinks": s_aux is not None,
        "a mask by sequence": dynamic_causal is not None,
        "no causal mask": not causal,
    }.items():
        if given:
            raise NotImplementedError(f"this stand-in for vLLM's attention does not do {what}")
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    slots = key_cache.shape[2]
    for row, length in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        if last == first:
            continue
        place = torch.arange(length)
        block, slot = block_table[row, place // slots].long(), place % slots
        mask = place <= torch.arange(length - (last - first), length)[:, None]
        attended = scaled_dot_product_attention(
            query[first:last].transpose(0, 1),
            key_cache[block, :, slot].transpose(0, 1),
            value_cache[block, :, slot].transpose(0, 1),
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        output[first:last] = attended.transpose(0, 1).reshape(output[first:last].shape)


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _draw(logits: Tensor, seeds: Tensor) -> Tensor:
    """A token of each row by its probability; by other random numbers than the kernel's."""
    drawn = []
    for row, seed in zip(logits, seeds.tolist(), strict=True):
        noise = torch.empty_like(row).exponential_(generator=torch.Generator().manual_seed(seed))
        drawn.append((row - noise.log()).argmax())
    return torch.stack(drawn)


_operator("init_cpu_memory_env(SymInt[] node_ids) -> ()", _nothing)
_operator(
    "get_scheduler_metadata(int num_req, int num_heads_q, int num_heads_kv, int head_dim, Tensor seq_lens, "
    "ScalarType dtype, Tensor query_start_loc, bool causal, int window_size, str isa_hint, bool enable_kv_split, "
    'Tensor? dynamic_causal, str kv_cache_dtype="auto") -> Tensor',
    _no_plan,
)
_operator(
    "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
    "Tensor(a3!) slot_mapping, SymInt block_size) -> ()",
    _slots,
)
_operator(
    "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a2!) key_cache, Tensor(a3!) value_cache, "
    'Tensor slot_mapping, str isa, float k_scale=1.0, float v_scale=1.0, str kv_cache_dtype="auto") -> ()',
    _store,
)
_operator(
    "cpu_attention_with_kv_cache(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a3!) output, "
    "Tensor query_start_loc, Tensor seq_lens, float scale, bool causal, Tensor? alibi_slopes, "
    "SymInt sliding_window_size, Tensor block_table, float softcap, Tensor scheduler_metadata, Tensor? s_aux, "
    'Tensor? dynamic_causal, float k_scale=1.0, float v_scale=1.0, str kv_cache_dtype="auto") -> ()',
    _attend,
)
_operator("greedy_argmax(Tensor logits) -> Tensor", _likeliest)
_operator("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor", _draw)
