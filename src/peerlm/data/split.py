"""The held-out split: which documents train, which are held out; of a single document, its end."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from peerlm.errors import UserError

LEAST_CHARACTERS = 400
"""A single document shorter than this has no end to hold out: a fifth of it would be a sentence or two."""
TAIL_CHARACTERS = 4096
"""At least this much of a single document is held out, some windows of text, but at most `TAIL_SHARE` of it."""
TAIL_SHARE = 0.2

_PART = 2**16
_BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n[^\S\n]*\n\s*", r"\n\s*", r"\s+"))
"""Where a document may be cut, the best first: paragraphs, lines, words."""


def document_key(text: bytes, seed: int) -> int:
    """The 64-bit keyed hash (BLAKE2b) by which a document is known; equal texts have equal keys."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def copy_key(text: str, seed: int) -> int:
    """The 64-bit keyed hash by which copies are known: of the text in normal form.

    That is Unicode's NFC, without byte order marks (U+FEFF), each run of white space one space, none at the ends. So
    line ends, indentation, a trailing newline and the way in which accents are written make no difference.
    """
    text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))
    begun = space = False
    for start in range(0, len(text), _PART):  # the words of a whole book would take ten times its memory
        part = text[start : start + _PART]
        space = space or part[0].isspace()
        if words := " ".join(part.split()):
            digest.update(b" " * (begun and space) + words.encode())
            begun, space = True, part[-1].isspace()
    return int.from_bytes(digest.digest(), "little")


def cut_tail(text: str, holdout: float) -> tuple[str, str]:
    """Cut a single document into what trains and what is held out, its end.

    The end is near `holdout` of the characters, but at least `TAIL_CHARACTERS`, or `TAIL_SHARE` of a text too short
    for that. The cut is the paragraph break nearest to there, if one makes the end half to twice as long as that; else
    such a line break; else such a space; else it is there.

    Raises:
        UserError: a text shorter than `LEAST_CHARACTERS`, white space around it apart; an end that is a copy of the
            rest.
    """
    text = text.strip()
    length = len(text)
    problem = f"the sources hold 1 distinct document of {length} characters"
    if length < LEAST_CHARACTERS:
        raise UserError(
            f"{problem}, too short to hold out its end: add text, {LEAST_CHARACTERS} characters at the least"
        )
    wanted = max(holdout * length, min(TAIL_CHARACTERS, TAIL_SHARE * length))
    target, first, last = int(length - wanted), max(0, int(length - 2 * wanted)), int(length - wanted / 2)
    for boundary in _BOUNDARIES:
        cuts = [match.end() for match in boundary.finditer(text, first, last)]
        if cuts:
            target = min(cuts, key=lambda cut: abs(target - cut))
            break
    head, tail = text[:target].rstrip(), text[target:].lstrip()
    if copy_key(head, 0) == copy_key(tail, 0):
        raise UserError(f"{problem}, whose end is a copy of the rest: lower holdout from {holdout}")
    return head, tail


def choose_heldout(
    keys: Sequence[int], sizes: Sequence[int], holdout: float, *, order: Sequence[int] | None = None
) -> frozenset[int]:
    """Choose the documents to hold out, so that they hold near `holdout` of the bytes.

    A plain draw per document misses the asked share by far where a few documents hold most of the text. Here documents
    are taken by falling power of two of their size. Within one such class they are in the random order of their keys
    (or of `order`). Each adds its size times `holdout` to an account; one that comes when the account covers the
    largest document of its class is held out and paid for. So within a class every document is equally likely to be
    held out, and every class gives its share as far as whole documents allow. The total falls short of `holdout` by
    less than twice the largest document; it exceeds it only where not even the smallest document fits, which is then
    held out alone. The choice depends on the set of documents and not on their order; equal documents count as one and
    stay together.

    Args:
        keys: 64-bit key of each document; documents with one key are copies.
        sizes: bytes of each document, at least 1.
        holdout: share of bytes to hold out, within (0, 1).
        order: a 64-bit number of each document that says when it is taken, copies by the least of theirs; None: its
            key.

    Returns:
        The keys of the documents to hold out.

    Raises:
        UserError: fewer than two distinct documents, of which one could not be held out.
    """
    unique, inverse = np.unique(np.asarray(keys, np.uint64), return_inverse=True)
    if len(unique) < 2:
        raise UserError(
            f"the sources hold {len(unique)} distinct document, and a held-out split needs at least two: add "
            "files, or lines <|endoftext|> between documents"
        )
    totals = np.bincount(inverse, weights=np.asarray(sizes)).astype(np.int64)
    size_class = np.frexp(totals)[1]
    class_largest = np.zeros(size_class.max() + 1, np.int64)
    np.maximum.at(class_largest, size_class, totals)
    rank = unique
    if order is not None:
        rank = np.full(len(unique), 2**64 - 1, np.uint64)
        np.minimum.at(rank, inverse, np.asarray(order, np.uint64))
    turn = np.lexsort((rank, -size_class))
    account = 0.0
    chosen = []
    # The arrays' buffers give plain integers, one at a time.
    columns = unique[turn].data, totals[turn].data, class_largest[size_class[turn]].data
    for key, size, largest in zip(*columns, strict=True):
        if account >= largest:
            account -= size
            chosen.append(key)
        account += holdout * size
    return frozenset(chosen or [int(unique[np.argmin(totals)])])
