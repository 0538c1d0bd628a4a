"""Each token's place in a text is where the tokenizer itself says that it begins."""

from typing import Any

import pytest

from peerlm.marks import document_marks
from peerlm.serve.http.offsets import Offsets
from peerlm.serve.http.texts import Texts


def texts_of(tokenizer: Any) -> Texts:
    return Texts(tokenizer, document_marks(tokenizer))


@pytest.mark.parametrize("text", ["a café 灯台 守: river", "灯", "river lantern", " river", "<s>river</s> moss"])
@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_tokens_of_a_prompt_begin_where_the_tokenizer_has_found_them(make_tokenizer: Any, kind: str, text: str) -> None:
    tokenizer = make_tokenizer(kind, byte_fallback=kind == "llama", template="<s> $A", bos="<s>")
    texts = texts_of(tokenizer)
    ids, places = texts.ids(text), Offsets(texts)
    said = [places.next(token, text) for token in ids]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    expected = [0] * (len(ids) - len(found)) + [begin for begin, _ in found]
    if kind == "bytes":
        assert said == expected
    else:  # where a space belongs to the token before or behind it, as one likes
        assert [text[place:].lstrip(" ") for place in said] == [text[place:].lstrip(" ") for place in expected]


def test_written_tokens_follow_the_prompt_and_special_ones_take_no_place(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")
    prompt, written = "a lamp 灯", " 守 river"
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    places = Offsets(texts_of(tokenizer))
    for token in tokenizer(prompt)["input_ids"]:
        places.next(token, prompt)
    said = [places.next(token) for token in [*ids, tokenizer.eos_token_id]]
    mapped = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert said == [len(prompt) + begin for begin, _ in mapped] + [len(prompt + written)]
    alone = Offsets(texts_of(tokenizer))
    assert [alone.next(token) for token in [tokenizer.eos_token_id, *ids[:1]]] == [0, 0]
