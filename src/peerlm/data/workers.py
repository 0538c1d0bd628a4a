"""Batches of text to token ids, in this process or in several, always in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peerlm.data.encoder import TextEncoder
from peerlm.data.text_loss import TextLoss
from peerlm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Texts = tuple[Sequence[str], Sequence[bool]]
"""Texts, and which of them continue a document."""

_AHEAD = 2
"""Batches that each process has or waits for."""


@dataclass(frozen=True)
class Encoded:
    """A batch."""

    ids: list[npt.NDArray[np.int64]]
    """Token ids of each text."""
    dropped: list[int]
    """UTF-8 bytes of each that no token stands for."""
    loss: TextLoss
    """Of this batch."""


class LostWorkerError(UserError):
    """A process was killed; what was written until then is good."""


@contextmanager
def batch_encoder(
    tokenizer: PreTrainedTokenizerFast, workers: int
) -> Iterator[Callable[[Iterable[Texts]], Iterator[Encoded]]]:
    """A context that gives a function: batches -> each of them encoded, in order.

    Args:
        tokenizer: whose engine is used.
        workers: processes; 1 is this one, whose tokenizer uses all cores itself. The ids do not depend on it.

    Raises:
        LostWorkerError: a process was killed, for example by the system since memory was short.
        UserError: a process failed otherwise.
    """
    if workers == 1:
        encoder = TextEncoder(tokenizer)
        yield lambda batches: (_encode(encoder, batch) for batch in batches)
        return
    # A fork has what is imported here, and needs no `if __name__ == "__main__"` in the caller's file.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer do not survive a fork
    pool = ProcessPoolExecutor(workers, context, _start, (tokenizer,))
    try:
        yield lambda batches: _in_order(pool, workers, batches)
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _in_order(pool: ProcessPoolExecutor, workers: int, batches: Iterable[Texts]) -> Iterator[Encoded]:
    coming: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            coming.append(pool.submit(_encode_in_worker, batch))
            if len(coming) > _AHEAD * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    except BrokenProcessPool as error:
        raise LostWorkerError(
            f"one of the {workers} processes that tokenize was killed, perhaps since memory was short: run the same "
            "again, with fewer workers if it happens again"
        ) from error


_encoder: TextEncoder | None = None
"""That of a worker."""


def _start(tokenizer: PreTrainedTokenizerFast) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _encoder = TextEncoder(tokenizer)


def _encode_in_worker(batch: Texts) -> Encoded:
    assert _encoder is not None
    try:
        return _encode(_encoder, batch)
    except Exception as error:
        raise UserError(f"a process that tokenizes failed ({type(error).__name__}: {error})") from None


def _encode(encoder: TextEncoder, batch: Texts) -> Encoded:
    texts, continues = batch
    encoder.loss = TextLoss()
    ids = encoder.encode(texts, continues)
    dropped = encoder.account(texts, ids, continues)
    return Encoded([np.array(tokens, np.int64) for tokens in ids], dropped, encoder.loss)
