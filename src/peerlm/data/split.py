"""The held-out split: which documents train, which are held out, by a keyed hash of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from peerlm.errors import UserError


def document_key(text: bytes, seed: int) -> int:
    """The 64-bit keyed hash (BLAKE2b) by which a document is known; equal texts have equal keys."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def choose_heldout(keys: Sequence[int], sizes: Sequence[int], holdout: float) -> frozenset[int]:
    """The keys of the documents to hold out, so that they hold near `holdout` of the bytes.

    A plain draw per document misses the asked share by far where a few documents hold most of the text. Here
    the documents are taken by falling power of two of their size, and in the random order of their keys
    within one such class. Each adds its size times `holdout` to an account; one that comes when the account
    covers the largest document of its class is held out and paid for. So within a class every document is as
    likely to be held out, every class gives its share as far as whole documents allow, and the total falls
    short of `holdout` by less than twice the largest document; it exceeds it only where not even the smallest
    document fits, which is then held out alone. The choice depends on the set of documents and not on their
    order; equal documents count as one and stay together.

    Args:
        keys: 64-bit key of each document.
        sizes: bytes of each document, at least 1.
        holdout: share of bytes to hold out, within (0, 1).

    Raises:
        UserError: fewer than two distinct documents, of which one could not be held out.
    """
    unique, inverse = np.unique(np.asarray(keys, np.uint64), return_inverse=True)
    if len(unique) < 2:
        raise UserError(
            f"the sources hold {len(unique)} distinct document, and a held-out split needs at least two: add "
            "files, or put lines <|endoftext|> between the documents of a text file"
        )
    totals = np.bincount(inverse, weights=np.asarray(sizes)).astype(np.int64)
    size_class = np.frexp(totals)[1]
    class_largest = np.zeros(size_class.max() + 1, np.int64)
    np.maximum.at(class_largest, size_class, totals)
    order = np.argsort(-size_class, kind="stable")  # `unique` is sorted, so keys rise within a class
    account = 0.0
    chosen = []
    # The arrays' buffers give plain integers, one at a time.
    columns = unique[order].data, totals[order].data, class_largest[size_class[order]].data
    for key, size, largest in zip(*columns, strict=True):
        if account >= largest:
            account -= size
            chosen.append(key)
        account += holdout * size
    return frozenset(chosen or [int(unique[np.argmin(totals)])])
