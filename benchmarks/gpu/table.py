"""The rows of a run as one table of 80 columns."""

from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 80
_NAME = 50


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each row, under its case, under the name of its section."""
    found = [f"{'':{_NAME}} {'ms':>10} {'ratio':>8} {'TB/s':>8}"]
    section = case = None
    for row in rows:
        if row["section"] != section:
            section, case = row["section"], None
            found.append(f"== {section} " + "=" * (WIDTH - len(section) - 4))
        name = str(row["case"])
        of_several = "contender" in row and name.endswith(f" / {row['contender']}")
        shape = _shape(row)
        if of_several:
            heading = " ".join([name.removesuffix(f" / {row['contender']}"), *shape])
            if heading != case:
                found.append(_cut(heading, WIDTH))
            case, name, shape = heading, f"  {row['contender']}", []
        found += _lines(" ".join([name, *shape]), row)
    return found


def _lines(name: str, row: Mapping[str, Any]) -> list[str]:
    if "ms" in row:
        rate = row.get("TB_per_s", "")
        if not rate and "TFLOP_per_s" in row:
            rate = f"{row['TFLOP_per_s']:.0f}TF"
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        return [f"{_cut(name, _NAME):{_NAME}} {row['ms']:>10.4f} {ratio:>8} {rate:>8}".rstrip()]
    text = _outcome(row)
    room = WIDTH - len(text) - 1
    if room >= len(name):
        return [f"{name:{room}} {text}"]
    return [_cut(name, WIDTH), "    " + _cut(text, WIDTH - 4)]


def _shape(row: Mapping[str, Any]) -> list[str]:
    """What tells cases of one name apart."""
    letters = {
        "tokens": "T=",
        "heads": "h=",
        "k": "k=",
        "dim": "D=",
        "n": "n=",
        "per_token": "P=",
        "row_bytes": "bytes=",
    }
    named = [f"{letter}{row[name]}" for name, letter in letters.items() if name in row]
    return named + [str(row[name]) for name in ("ids", "rows") if name in row]


def _outcome(row: Mapping[str, Any]) -> str:
    if "ok" in row:
        facts = ", ".join(f"{name} {row[name]}" for name in ("share", "mismatches", "error") if row.get(name))
        return ("ok" if row["ok"] else "WRONG") + (f" ({facts})" if facts else "")
    if row.get("out_of_memory"):
        return "out of memory"
    for name in ("failed", "skipped"):
        if name in row:
            return f"{name}: {row[name]}"
    known = ("tokens_per_s", "share_of_peak", "share", "first_loss", "last_loss", "peak_GiB")
    return ", ".join(f"{name} {row[name]}" for name in known if name in row)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
