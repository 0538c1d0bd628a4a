"""A short training of a language model: tokens per second, share of the card's peak, and that the loss goes down."""

import itertools
import lzma
import math
import runpy
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from contenders import check_backend
from decoder import Decoder
from machine import ROOT
from report import Report, SkippedError
from steps import TrainSteps, captured
from torch import Tensor, nn

from peerlm import PEER, DenseFFW
from peerlm.accounting import model_cost
from peerlm.optim import RowAdamW, parameter_groups

VOCABULARY = 4096
LEARNING_RATE = 2e-3
PRESET: dict[str, Any] = runpy.run_path(str(ROOT / "src/peerlm/train/presets.py"))["PRESETS"]["tuned"]
"""By its file: the package around it needs more than torch."""


def run(report: Report) -> None:
    """Dense models, then PEER in the inner half of the blocks by each backend; then those of transformers.

    Steps are those of `peerlm train`, in a CUDA graph where the name says so.
    """
    sizes = report.sizes
    peak = report.attempt("peak: matrix product", lambda: _peak(report))
    ids = report.attempt("ids of the embedded corpus", lambda: corpus_ids().to(report.device))
    if ids is None:
        return

    def dense(hidden: int) -> nn.Module:
        return _decoder(report, lambda: DenseFFW(sizes.model_width, hidden=hidden))

    def ours(backend: str) -> nn.Module:
        return _decoder(report, lambda: _peer(report, backend))

    equal = _equal_hidden(report)
    with captured.own_stream(torch.device(report.device)):
        for name, build, graph in (
            ("dense, equal FLOPs, graph", lambda: dense(equal), True),
            ("PEER, triton, graph", lambda: ours("triton"), True),
            ("PEER, triton", lambda: ours("triton"), False),
            ("PEER, reference", lambda: ours("reference"), False),
            ("dense, equal FLOPs", lambda: dense(equal), False),
            ("dense, 4 D neurons, graph", lambda: dense(4 * sizes.model_width), True),
            ("PeerForCausalLM, peer:inner, graph", lambda: _of_transformers(report, "peer:inner"), True),
            ("PeerForCausalLM, dense, graph", lambda: _of_transformers(report, "dense"), True),
        ):
            _train(report, name, build, ids, peak, graph=graph)


def corpus_ids() -> Tensor:
    """The embedded corpus as ids of its pairs of bytes; all but the 4,095 most frequent are one id. (S,) int64."""
    with lzma.open(ROOT / "src/peerlm/corpus/demo_corpus.txt.xz") as corpus:
        text = np.frombuffer(corpus.read(4 << 20), dtype=np.uint8)
    pairs = text[: len(text) // 2 * 2].reshape(-1, 2).astype(np.int64) @ np.array([256, 1])
    frequent = np.argsort(-np.bincount(pairs, minlength=65536), kind="stable")[: VOCABULARY - 1]
    id_of = np.zeros(65536, dtype=np.int64)
    id_of[frequent] = np.arange(1, VOCABULARY)
    return torch.from_numpy(id_of[pairs])


def _peak(report: Report) -> float:
    """TFLOP/s of a large matrix product in bfloat16, the better of a few."""
    n = report.sizes.gemm
    a, b = (torch.randn(n, n, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    case = lambda turn: a @ b  # noqa: E731
    return 2 * n**3 / min(report.timer.once(case, turn) for turn in range(8)) / 1e9


def _peer_settings(report: Report) -> dict[str, Any]:
    sizes = report.sizes
    own = {"num_experts": sizes.model_experts, "experts_per_head": sizes.model_experts_per_head}
    return PRESET["model"]["peer"] | own


def _peer(report: Report, backend: str) -> nn.Module:
    check_backend(backend)
    return PEER(report.sizes.model_width, backend=backend, **_peer_settings(report))


def _equal_hidden(report: Report) -> int:
    """Hidden neurons of a dense layer with the FLOPs of the PEER layer."""
    peer, width = _peer_settings(report), report.sizes.model_width
    index = 2 * peer["heads"] * peer["key_dim"] * (width + math.isqrt(peer["num_experts"]))
    experts = 4 * width * peer["heads"] * peer["experts_per_head"]
    return round((index + experts) / (4 * width))


def _decoder(report: Report, inner: Callable[[], nn.Module]) -> nn.Module:
    sizes = report.sizes
    outer = sizes.model_blocks // 4
    layers = [
        inner if outer <= block < sizes.model_blocks - outer else lambda: DenseFFW(sizes.model_width)
        for block in range(sizes.model_blocks)
    ]
    with torch.device(report.device):
        return _LossOf(Decoder(VOCABULARY, sizes.model_width, max(1, sizes.model_width // 64), layers))


def _of_transformers(report: Report, kind: str) -> nn.Module:
    try:
        from peerlm.model import PeerConfig, PeerForCausalLM
    except ImportError as error:
        raise SkippedError(f"{error}") from error
    sizes = report.sizes
    config = PeerConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.model_width,
        num_hidden_layers=sizes.model_blocks,
        num_attention_heads=max(1, sizes.model_width // 64),
        max_position_embeddings=sizes.model_context,
        ffw_layers=kind,
        ffw_init_scale=PRESET["model"]["ffw_init_scale"],
        peer=_peer_settings(report),
    )
    with torch.device(report.device):
        return PeerForCausalLM(config)


class _LossOf(nn.Module):
    """A decoder as a model of transformers that gives its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        """Mean loss of the next id, of ids (B, S)."""
        return SimpleNamespace(loss=self.model(input_ids))


def _train(
    report: Report, name: str, build: Callable[[], nn.Module], ids: Tensor, peak: float | None, *, graph: bool
) -> None:
    found = report.attempt(name, lambda: _trained(report, build, ids, peak, graph=graph))
    if found is not None:
        report.row(name, contender=name, width=report.sizes.model_width, blocks=report.sizes.model_blocks, **found)
    report.give_back()


def _trained(
    report: Report, build: Callable[[], nn.Module], ids: Tensor, peak: float | None, *, graph: bool
) -> dict[str, object]:
    sizes = report.sizes
    torch.manual_seed(0)
    model = build()
    optim = PRESET["optim"]
    groups = parameter_groups(
        model,
        table_lr_multiplier=optim["table_lr_multiplier"],
        keys_lr_multiplier=optim["keys_lr_multiplier"],
    )
    for group in groups:
        group["lr"] = LEARNING_RATE * group["lr_multiplier"]
    steps = TrainSteps(model, RowAdamW(groups, lr=LEARNING_RATE), report.device, graph=graph, precision=torch.bfloat16)
    length = sizes.model_context
    windows = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).to(ids.device)
    losses: list[float] = []
    seconds: list[float] = []
    together = max(1, sizes.model_steps // 6)
    if report.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = 0
    for step in range(sizes.model_steps):
        if report.left() <= 0:
            break
        if step % together == 0:
            _read(steps, losses, seconds, step > 0)
        steps.make(windows[order[step * sizes.model_batch : (step + 1) * sizes.model_batch]])
        taken += 1
    _read(steps, losses, seconds, taken % together == 0)
    first, last = losses[0] / together, losses[-1] / together
    # the first steps compile and the second are captured
    whole = [b - a for a, b in itertools.pairwise(seconds[1:])] or [seconds[-1] - seconds[0]]
    tokens_per_second = together * sizes.model_batch * length / statistics.median(whole)
    flops = model_cost(model, length).training_flops_per_token
    found: dict[str, object] = {
        "tokens_per_s": round(tokens_per_second),
        "steps": taken,
        "first_loss": round(first, 4),
        "last_loss": round(last, 4),
        "loss_goes_down": last < first,
        "training_flops_per_token": flops,
        "tokens_per_step": sizes.model_batch * length,
    }
    if graph and steps.steps.obstacle:
        found["not captured"] = steps.steps.obstacle
    if peak:
        found["share_of_peak"] = round(flops * tokens_per_second / peak / 1e12, 4)
        found["peak_TFLOP_per_s"] = round(peak, 1)
    if report.device == "cuda":
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _read(steps: TrainSteps, losses: list[float], seconds: list[float], is_whole: bool) -> None:
    """Wait for the steps since the last time, as `peerlm train` does where it writes a row."""
    loss_sum, _ = steps.measures.read()
    seconds.append(time.perf_counter())
    if is_whole:
        losses.append(loss_sum)
    steps.measures.begin()
