"""The page: one HTML file with its style, its program and its data, which makes no requests."""

import base64
import gzip
import html
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

_PARTS = resources.files("peerlm.interpret") / "page"
_PROGRAM = ("data.js", "charts.js", "views.js", "main.js")


@dataclass(frozen=True)
class Packed:
    """An array of the page, and the type by which the page reads it."""

    kind: str
    """One of "uint8", "uint16", "uint32" and "bfloat16"."""
    array: np.ndarray[Any, Any]


def render(title: str, data: dict[str, Any]) -> str:
    """The page with this data: values of JSON, and `Packed` arrays.

    The text that was read is in the data alone, where `<` is written as an escape. So nothing in it can end the script;
    the page shows it as text, never as markup.
    """
    program = "\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _PROGRAM)
    packed = json.dumps(data, default=_packed, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(title),
        "style": (_PARTS / "style.css").read_text(encoding="utf-8"),
        "program": program,
        "data": packed.replace("<", "\\u003c"),
    }
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    pieces = page.split("{{")
    rest = [piece.split("}}", 1) for piece in pieces[1:]]
    return pieces[0] + "".join(parts[name] + text for name, text in rest)


def _packed(value: object) -> dict[str, Any]:
    """An array as JSON: its type, its shape, and its bytes, little-endian, compressed, in base64."""
    if not isinstance(value, Packed):
        raise TypeError(f"{type(value).__name__} cannot stand in a page; give values of JSON or Packed arrays")
    little = np.ascontiguousarray(value.array, dtype=value.array.dtype.newbyteorder("<"))
    content = base64.b64encode(gzip.compress(little.tobytes(), mtime=0)).decode()
    return {"kind": value.kind, "shape": value.array.shape, "gzip": content}
