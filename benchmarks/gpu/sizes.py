"""The shapes of a run: those of the paper's layer, or tiny ones that the interpreter gets through."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes and repetitions; see the fields."""

    num_experts: int
    """N, a square number."""
    dim: int
    """D, the width of the layer."""
    narrow_dim: int
    """A second width of rows, a quarter of the first."""
    heads: int
    experts_per_head: int
    """k."""
    key_dim: int
    """Size of a query; half of it meets a sub-key."""
    tokens: int
    """T of most figures."""
    many_tokens: int
    """T at which gathered rows no longer fit into memory."""
    rounds: int
    """How often each contender is timed, at most."""
    row_widths: tuple[int, ...]
    """Widths in bfloat16 numbers of the rows whose gather is a ceiling."""
    programs: int
    """Of a kernel whose programs take one row after the other."""
    copy_bytes: int
    gemm: int
    """Side of the square matrices whose product is a ceiling."""
    moe_experts: int
    moe_hidden: int
    checked_tokens: int
    """T of an exhaustive search."""
    activations: tuple[str, ...]
    """Of experts that are checked; empty: all."""
    trained_steps: int
    """Of the layer whose sub-keys are checked after a training."""
    optimizer_steps: int
    optimizer_rows: int
    optimizer_touched: int
    """Steps of the optimizer that are checked, on tables of so many rows, of which so many have a gradient."""
    large_k: int
    large_n: int
    """The most experts per head and sub-keys per half that are checked."""
    over_2_31: int
    """Experts of width `dim` whose numbers are more than 2^31; 0: left out."""
    model_width: int
    model_blocks: int
    model_experts: int
    model_experts_per_head: int
    model_batch: int
    model_context: int
    model_steps: int

    @property
    def per_token(self) -> int:
        """P, experts of a token."""
        return self.heads * self.experts_per_head


FULL = Sizes(
    num_experts=1024**2,
    dim=1024,
    narrow_dim=256,
    heads=8,
    experts_per_head=16,
    key_dim=128,
    tokens=8192,
    many_tokens=65536,
    rounds=15,
    row_widths=(256, 512, 1024, 2048, 4096),
    programs=132 * 16,
    copy_bytes=1 << 30,
    gemm=8192,
    moe_experts=64,
    moe_hidden=512,
    checked_tokens=32,
    activations=(),
    trained_steps=200,
    optimizer_steps=12,
    optimizer_rows=96,
    optimizer_touched=24,
    large_k=64,
    large_n=4096,
    over_2_31=1025**2,
    model_width=512,
    model_blocks=8,
    model_experts=256**2,
    model_experts_per_head=64,
    model_batch=32,
    model_context=512,
    model_steps=60,
)

TINY = Sizes(
    num_experts=16**2,
    dim=16,
    narrow_dim=8,
    heads=2,
    experts_per_head=2,
    key_dim=8,
    tokens=2,
    many_tokens=4,
    rounds=1,
    row_widths=(16,),
    programs=4,
    copy_bytes=1 << 12,
    gemm=32,
    moe_experts=4,
    moe_hidden=16,
    checked_tokens=3,
    activations=("gelu", "relu"),
    trained_steps=2,
    optimizer_steps=3,
    optimizer_rows=12,
    optimizer_touched=4,
    large_k=4,
    large_n=32,
    over_2_31=0,
    model_width=32,
    model_blocks=4,
    model_experts=16**2,
    model_experts_per_head=2,
    model_batch=1,
    model_context=8,
    model_steps=3,
)

SIZES = {"full": FULL, "tiny": TINY}
