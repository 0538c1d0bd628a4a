"""The layers that are compared: ours by each backend, PEER-pytorch, dense and grouped ones, with their optimizers."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from report import SkippedError
from sizes import Sizes
from timing import Case
from torch import Tensor, nn

from peerlm import PEER, DenseFFW
from peerlm.ops import api
from peerlm.optim import RowAdamW, parameter_groups

LEARNING_RATE = 1e-4
INPUTS = 3
"""Batches in rotation, so that a round does not find its rows in the cache."""
Part = str
"""\"forward", "backward" (with the forward pass) or "step" (with both)."""
PARTS: tuple[Part, ...] = ("forward", "backward", "step")


BACKENDS = ("triton", "bag", "reference")
"""Ours, and what peerlm has on a GPU without it."""


def check_backend(backend: str) -> None:
    """Raise SkippedError where a backend is not there."""
    try:
        api.check_backend(backend)
    except ValueError as error:
        raise SkippedError(str(error)) from error


def peer(
    sizes: Sizes,
    device: str,
    backend: str,
    *,
    heads: int | None = None,
    row_format: str = "bfloat16",
    dim: int | None = None,
) -> PEER:
    """Our layer with the index that PEER-pytorch has: keys per head, no query norm. All in bfloat16, or all float32."""
    check_backend(backend)
    with torch.device(device):
        layer = PEER(
            dim or sizes.dim,
            num_experts=sizes.num_experts,
            heads=heads or sizes.heads,
            experts_per_head=sizes.experts_per_head,
            key_dim=sizes.key_dim,
            shared_keys=False,
            query_norm="none",
            row_format=row_format,
            backend=backend,
        )
    return layer.to(torch.bfloat16) if row_format == "bfloat16" else layer


def peer_pytorch(sizes: Sizes, device: str, *, heads: int | None = None) -> nn.Module:
    """The package from PyPI, its weights like ours; without `non_competing_scores=False` it retrieves one per head."""
    try:
        from PEER_pytorch import PEER as PeerPytorch  # noqa: N811
    except ImportError as error:
        raise SkippedError(f"{error}; run.py --prepare fetches it") from error

    with torch.device(device):
        layer = PeerPytorch(
            sizes.dim,
            heads=heads or sizes.heads,
            num_experts=sizes.num_experts,
            num_experts_per_head=sizes.experts_per_head,
            dim_key=sizes.key_dim // 2,
            non_competing_scores=False,
        )
    return _InBatches(layer.to(torch.bfloat16))


class _InBatches(nn.Module):
    """A layer of (B, T, D) that takes (T, D)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.layer(x[None])[0]


def dense(sizes: Sizes, device: str, hidden: int) -> nn.Module:
    """A dense feed-forward layer in bfloat16."""
    with torch.device(device):
        return DenseFFW(sizes.dim, hidden=hidden).to(torch.bfloat16)


def dense_hidden(sizes: Sizes, heads: int | None = None) -> dict[str, int]:
    """Hidden neurons of the dense layers that are compared, by what they have in common with ours."""
    heads = heads or sizes.heads
    active = heads * sizes.experts_per_head
    flops = 2 * sizes.dim * heads * sizes.key_dim + 2 * heads * math.isqrt(sizes.num_experts) * sizes.key_dim
    flops += 4 * sizes.dim * active
    return {
        "dense, equal active neurons": active,
        "dense, equal FLOPs": round(flops / (4 * sizes.dim) / 16) * 16 or 16,
        "dense, 4 D neurons": 4 * sizes.dim,
    }


class GroupedMoE(nn.Module):
    """A mixture of experts, each token's two best of some, by torch's grouped matrix products."""

    def __init__(self, sizes: Sizes, device: str):
        super().__init__()
        with torch.device(device):
            scale = sizes.dim**-0.5
            shape = (sizes.moe_experts, sizes.dim, sizes.moe_hidden)
            self.router = nn.Linear(sizes.dim, sizes.moe_experts, bias=False, dtype=torch.bfloat16)
            self.down = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16) * scale)
            self.up = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16).mT.contiguous() * scale)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        gates_TK, experts_TK = self.router(x).float().softmax(-1).topk(2, dim=-1)
        expert_E, order = experts_TK.flatten().sort(stable=True)
        every = torch.arange(len(self.down), device=x.device)
        ends = torch.searchsorted(expert_E, every, right=True).to(torch.int32)
        token = order // 2
        out = product(F.gelu(product(x[token], self.down, offs=ends)), self.up, offs=ends)
        out = out * gates_TK.flatten()[order, None].to(out.dtype)
        return torch.zeros_like(x).index_add(0, token, out)


def adamw(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Torch's fused AdamW."""
    return [torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)]


def row_adamw(**settings: object) -> Callable[[nn.Module], list[torch.optim.Optimizer]]:
    """Our AdamW by rows."""
    return lambda module: [RowAdamW(parameter_groups(module), lr=LEARNING_RATE, **settings)]


def batches(sizes: Sizes, device: str, tokens: int, dtype: torch.dtype, dim: int | None = None) -> list[Tensor]:
    """Inputs in rotation, (T, D) each."""
    return [torch.randn(tokens, dim or sizes.dim, device=device).to(dtype) for _ in range(INPUTS)]


def case_of(
    part: Part,
    module: nn.Module,
    inputs: Sequence[Tensor],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    call: Callable[[Tensor], Tensor] | None = None,
) -> Case:
    """What is timed of a layer; `call` in its place where it is compiled."""
    call = module if call is None else call
    gradient = torch.randn_like(inputs[0]) / inputs[0].numel() ** 0.5

    def forward(turn: int) -> object:
        with torch.no_grad():
            return call(inputs[turn % len(inputs)])

    def backward(turn: int) -> object:
        module.zero_grad(set_to_none=True)
        x = inputs[turn % len(inputs)].detach().requires_grad_()
        return call(x).backward(gradient)

    def step(turn: int) -> object:
        backward(turn)
        for optimizer in optimizers:
            optimizer.step()
        return None

    return {"forward": forward, "backward": backward, "step": step}[part]
