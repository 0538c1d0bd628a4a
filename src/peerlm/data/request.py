"""What a prepared folder was asked for: the request in its manifest, and how another one differs from it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlm.data.manifest import file_sha256
from peerlm.data.sources import HubDataset, fingerprint
from peerlm.data.tokenizer import tokenizer_file
from peerlm.errors import shortened


def request_of(
    found: Sequence[Path | HubDataset],
    *,
    tokenizer: str | Path | None,
    vocab_size: int,
    holdout: float | None,
    heldout_bytes: int,
    seed: int,
    text_field: str,
    shard_tokens: int,
    tokenizer_bytes: int,
    document_start: list[int] | None = None,
) -> dict[str, Any]:
    """The arguments of `prepare` as JSON values: equal requests make equal folders."""
    request = {
        "sources": [fingerprint(source) for source in found],
        "text_field": text_field,
        "holdout": holdout,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "tokenizer": None if tokenizer is None else file_sha256(tokenizer_file(tokenizer)),
        "vocab_size": vocab_size if tokenizer is None else None,
        "tokenizer_bytes": tokenizer_bytes if tokenizer is None else None,
    }
    added_later = {"heldout_bytes": heldout_bytes, "document_start": document_start}
    return request | {name: value for name, value in added_later.items() if value}


def difference(name: str, before: object, now: object) -> str:
    """How one entry of a request differs from another's, in bounded words: `seed = 0, not 1`."""
    if name == "sources" and isinstance(before, Sequence) and isinstance(now, Sequence):
        return _source_difference(before, now)
    return f"{name} = {shortened(repr(before))}, not {shortened(repr(now))}"


def sources_said(sources: Sequence[Mapping[str, Any]]) -> str:
    """Sources of a request in a few words: the first one's name and how many more there are."""
    if not sources:
        return "nothing"
    more = f" and {len(sources) - 1:,} more" if len(sources) > 1 else ""
    return source_name(sources[0]) + more


def _source_difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    if list(map(source_name, before)) == list(map(source_name, now)):
        different = [(old, new) for old, new in zip(before, now, strict=True) if old != new]
        changed = [new for old, new in different if {**old, "mtime_ns": None} != {**new, "mtime_ns": None}]
        how = "has changed since" if changed else "is dated otherwise now, as large as before"
        first = changed[0] if changed else different[0][1]
        return f"sources = {sources_said(before)}, of which {source_name(first)} {how}"
    return f"sources = {sources_said(before)}, not {sources_said(now)}"


def source_name(source: Mapping[str, Any]) -> str:
    """The path of a source of a request, or hf:NAME:CONFIG:SPLIT."""
    parts = (source.get(part) or "" for part in ("dataset", "config", "split"))
    return shortened(str(source.get("path") or "hf:" + ":".join(parts)))
