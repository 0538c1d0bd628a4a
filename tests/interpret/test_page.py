"""The page as a file: what it holds, and that nothing of the text is markup."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from peerlm.interpret.page import Packed, render
from peerlm.interpret.page_data import _rounded, _whole

VOID = {"meta", "br", "input", "link", "img", "hr"}
HOSTILE = "</script><script>alert(1)</script><!-- & {{style}} \u2028 灯"


class Structure(HTMLParser):
    """Tags that are open, ids, and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.scripts = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[name] for name in ("src", "href", "action", "srcset") if name in values]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_tags_match_ids_are_distinct_and_nothing_is_asked_for():
    page = render("a <b> & c", {"strings": [HOSTILE]})
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    assert structure.addresses
    assert all(address.startswith("#") for address in structure.addresses)
    assert structure.scripts == 2
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|innerHTML", page)
    assert "default-src 'none'" in page
    labels = re.findall(r'(?:for|aria-labelledby)="([^"]+)"', page)
    assert set(labels) <= set(structure.ids)


def test_text_and_title_are_escaped_and_come_back():
    page = render("a <b> & c", {"strings": [HOSTILE], "{{title}}": HOSTILE})
    assert data_of(page) == {"strings": [HOSTILE], "{{title}}": HOSTILE}
    assert page.count("<script") == 2
    assert "<title>a &lt;b&gt; &amp; c</title>" in page


def test_arrays_come_back():
    packed = data_of(
        render("t", {"x": _rounded(torch.tensor([[1.0, -2.5, 3e-5]])), "n": _whole(torch.tensor([7, 70000]))})
    )
    bits = np.frombuffer(gzip.decompress(base64.b64decode(packed["x"]["gzip"])), dtype="<u2").astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == pytest.approx([1.0, -2.5, 3e-5], rel=2**-8)
    assert (packed["x"]["kind"], packed["x"]["shape"]) == ("bfloat16", [1, 3])
    assert packed["n"]["kind"] == "uint32"
    assert np.frombuffer(gzip.decompress(base64.b64decode(packed["n"]["gzip"])), dtype="<u4").tolist() == [7, 70000]
    assert _whole(torch.tensor([7])).kind == "uint8"
    assert _whole(torch.tensor([], dtype=torch.int64)).kind == "uint8"


def test_what_cannot_stand_in_a_page_is_said():
    with pytest.raises(TypeError, match="set cannot stand in a page"):
        render("t", {"x": {1, 2}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        render("t", {"x": float("nan")})
    assert Packed("uint8", np.zeros(1, np.uint8)).kind == "uint8"
