"""The rows of a run as one table of 80 columns."""

from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 80
_NAME = 50


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each row, under the name of its section."""
    found = [f"{'':{_NAME}} {'ms':>10} {'ratio':>8} {'TB/s':>8}"]
    section = None
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            found.append(f"== {section} " + "=" * (WIDTH - len(section) - 4))
        found += _lines(row)
    return found


def _lines(row: Mapping[str, Any]) -> list[str]:
    name = " ".join([str(row["case"]), *_shape(row)])
    if "ms" in row:
        rate = row.get("TB_per_s", "")
        if not rate and "TFLOP_per_s" in row:
            rate = f"{row['TFLOP_per_s']:.0f}TF"
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        return [f"{_cut(name, _NAME):{_NAME}} {row['ms']:>10.4f} {ratio:>8} {rate:>8}"]
    text = _outcome(row)
    room = WIDTH - len(text) - 1
    if room >= 30:
        return [f"{_cut(name, room):{room}} {text}"]
    return [_cut(name, WIDTH), "    " + _cut(text, WIDTH - 4)]


def _shape(row: Mapping[str, Any]) -> list[str]:
    letters = {"tokens": "T", "dim": "D", "row_bytes": "B", "ids": "", "k": "k", "n": "n", "rows": ""}
    return [f"{letter}{row[name]}" for name, letter in letters.items() if name in row]


def _outcome(row: Mapping[str, Any]) -> str:
    if "ok" in row:
        facts = ", ".join(f"{name} {row[name]}" for name in ("share", "mismatches", "error") if row.get(name))
        return ("ok" if row["ok"] else "WRONG") + (f" ({facts})" if facts else "")
    if row.get("out_of_memory"):
        return "out of memory"
    for name in ("failed", "skipped"):
        if name in row:
            return f"{name}: {row[name]}"
    known = ("tokens_per_s", "share_of_peak", "first_loss", "last_loss", "peak_GiB")
    return ", ".join(f"{name} {row[name]}" for name in known if name in row)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
