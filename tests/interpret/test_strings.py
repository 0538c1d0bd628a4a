"""Tokens as strings: together they are the text, whatever it is written in."""

import torch

from peerlm.evaluate.encoding import encode
from peerlm.interpret.strings import TokenStrings


def test_the_strings_of_a_text_are_the_text(tokenizer):
    document = "A café\n\n naïve 灯台 守 — 🗼🗼 end.\tΩ"
    ids = encode(tokenizer, [document]).tokens[1:].tolist()
    table = TokenStrings(tokenizer)
    places = table.text(ids)
    assert "".join(table.strings[place] for place in places) == document
    assert len(set(table.strings)) == len(table.strings)
    assert any("\ufffd" in table.string(token) for token in ids)  # there were split characters


def test_bytes_that_are_no_character_stay_visible(tokenizer):
    parts = tokenizer.encode("🗼", add_special_tokens=False)
    table = TokenStrings(tokenizer)
    assert "\ufffd" in "".join(table.strings[place] for place in table.text(parts[:1]))


def test_a_vocabulary_keeps_its_shape_and_leading_spaces(tokenizer):
    table = TokenStrings(tokenizer)
    ids = torch.tensor([tokenizer.encode(" the keeper", add_special_tokens=False)[:2]] * 2)
    places = table.vocabulary(ids)
    assert places.shape == ids.shape
    assert table.strings[int(places[0, 0])].startswith(" ")
