"""A short training of a language model: tokens per second, share of the card's peak, and that the loss goes down."""

import itertools
import lzma
import math
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from contenders import BACKENDS, check_backend
from decoder import Decoder
from machine import ROOT
from report import Report, SkippedError
from torch import Tensor, nn

from peerlm import PEER, DenseFFW
from peerlm.accounting import model_cost
from peerlm.optim import RowAdamW, parameter_groups

VOCABULARY = 4096
LEARNING_RATE = 2e-3
PRESET: dict[str, Any] = runpy.run_path(str(ROOT / "src/peerlm/train/presets.py"))["PRESETS"]["tuned"]
"""By its file: the package around it needs more than torch."""


def run(report: Report) -> None:
    """Dense models, then PEER in the inner half of the blocks by each backend; then those of transformers."""
    sizes = report.sizes
    peak = report.attempt("peak: matrix product", lambda: _peak(report))
    ids = report.attempt("ids of the embedded corpus", lambda: corpus_ids().to(report.device))
    if ids is None:
        return
    hidden = {"dense, 4 D neurons": 4 * sizes.model_width, "dense, equal FLOPs": _equal_hidden(report)}
    for name, inner in hidden.items():
        _train(
            report,
            name,
            lambda inner=inner: _decoder(report, lambda: DenseFFW(sizes.model_width, hidden=inner)),
            ids,
            peak,
        )
    for backend in BACKENDS:
        if backend != "bag":  # no sparse gradients
            _train(
                report,
                f"PEER, {backend}",
                lambda backend=backend: _decoder(report, lambda: _peer(report, backend)),
                ids,
                peak,
            )
    for kind in ("dense", "peer:inner"):
        _train(report, f"PeerForCausalLM, {kind}", lambda kind=kind: _of_transformers(report, kind), ids, peak)


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
        return Decoder(VOCABULARY, sizes.model_width, max(1, sizes.model_width // 64), layers)


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
        return _LossOf(PeerForCausalLM(config))


class _LossOf(nn.Module):
    """A model of transformers that gives its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of the next id, of ids (B, S + 1)."""
        return self.model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss


def _train(report: Report, name: str, build: Callable[[], nn.Module], ids: Tensor, peak: float | None) -> None:
    found = report.attempt(name, lambda: _trained(report, build, ids, peak))
    if found is not None:
        report.row(name, contender=name, width=report.sizes.model_width, blocks=report.sizes.model_blocks, **found)
    report.give_back()


def _trained(report: Report, build: Callable[[], nn.Module], ids: Tensor, peak: float | None) -> dict[str, object]:
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
    optimizer = RowAdamW(groups, lr=LEARNING_RATE)
    length = sizes.model_context + 1
    windows = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).to(ids.device)
    losses: list[Tensor] = []
    seconds: list[float] = []
    together = max(1, sizes.model_steps // 6)
    if report.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(sizes.model_steps):
        if report.left() <= 0:
            break
        if step % together == 0:
            report.timer.synchronise()
            seconds.append(time.perf_counter())
        batch = windows[order[step * sizes.model_batch : (step + 1) * sizes.model_batch]]
        with torch.autocast(report.device, dtype=torch.bfloat16):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    report.timer.synchronise()
    seconds.append(time.perf_counter())
    values = torch.stack(losses).tolist()
    first, last = statistics.mean(values[:together]), statistics.mean(values[-together:])
    whole = [b - a for a, b in itertools.pairwise(seconds[1:])] or [seconds[-1] - seconds[0]]  # the first compiles
    tokens_per_second = together * sizes.model_batch * sizes.model_context / statistics.median(whole)
    flops = model_cost(model, sizes.model_context).training_flops_per_token
    found: dict[str, object] = {
        "tokens_per_s": round(tokens_per_second),
        "steps": len(losses),
        "first_loss": round(first, 4),
        "last_loss": round(last, 4),
        "loss_goes_down": last < first,
        "training_flops_per_token": flops,
        "tokens_per_step": sizes.model_batch * sizes.model_context,
    }
    if peak:
        found["share_of_peak"] = round(flops * tokens_per_second / peak / 1e12, 4)
        found["peak_TFLOP_per_s"] = round(peak, 1)
    if report.device == "cuda":
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found
