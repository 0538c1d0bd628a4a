import json
import math

import pytest

from peerlm.errors import UserError
from peerlm.evaluate import evaluate, score_last_words, score_text
from peerlm.evaluate.run import _finite
from peerlm.usage import record_usage

DOCUMENTS = ["The old keeper climbed the stairs and lit the lamp.", "Nobody answered the door."]
PASSAGES = [("The old keeper lit the", "lamp"), ("Nobody answered the", "door")]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    return path


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.jsonl"
    rows = [{"context": context, "continuation": word} for context, word in PASSAGES]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_row_for_each_file(saved, model, tokenizer, text, passages):
    rows = evaluate(saved, [text, str(passages)], context=16, progress=False)
    assert list(rows) == [str(text), str(passages)]
    with record_usage(model) as usage:
        score = score_text(model, tokenizer, DOCUMENTS, context=16, stride=8)
    (layer,) = usage.values()
    begins = {"document_start": "<|endoftext|>", "start_from": "the tokenizer's bos_token"}
    assert rows[str(text)] == {
        "context": 16,
        **begins,
        "reading": "documents in sequence",
        "stride": 8,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "words": score.words,
        "perplexity": pytest.approx(score.perplexity),
        "word_perplexity": pytest.approx(score.word_perplexity),
        "bits_per_byte": pytest.approx(score.bits_per_byte),
        "usage": [layer.share],
        "unevenness": [pytest.approx(layer.unevenness)],
    }
    last_words = score_last_words(model, tokenizer, PASSAGES, context=16)
    row = rows[str(passages)]
    assert 0 < row.pop("usage")[0] <= 1
    assert 0 < row.pop("unevenness")[0] < math.log(64)
    assert row == {
        "context": 16,
        **begins,
        "passages": 2,
        "truncated": last_words.truncated,
        "perplexity": pytest.approx(last_words.perplexity),
        "accuracy": last_words.accuracy,
    }


def test_rows_are_ready_for_json(saved, text, passages):
    rows = evaluate(saved, [text, passages], context=16, progress=False)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert _finite(math.inf) is None


def test_context_and_stride_have_defaults(saved, text, tmp_path):
    row = evaluate(saved, [text], progress=False)[str(text)]
    assert (row["context"], row["stride"]) == (64, 32)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"context": 24}}))
    (run / "model").symlink_to(saved)
    row = evaluate(run, [text], progress=False)[str(text)]
    assert (row["context"], row["stride"]) == (24, 12)
    row = evaluate(run, [text], context=10, stride=3, progress=False)[str(text)]
    assert (row["context"], row["stride"]) == (10, 3)


def test_of_a_long_text_no_more_is_read_than_the_limit_asks_for(saved, text, tmp_path):
    line = text.read_text(encoding="utf-8").replace("\n", " ") + "\n"
    long = tmp_path / "long.txt"
    long.write_bytes((line * (2**19 // len(line.encode()))).encode() + b"\0 no text")
    (row,) = evaluate(saved, [long], limit=100, progress=False).values()
    whole = tmp_path / "whole.txt"
    whole.write_text(line * 20, encoding="utf-8")
    (expected,) = evaluate(saved, [whole], limit=100, progress=False).values()
    assert row == expected
    with pytest.raises(UserError, match="a NUL byte"):
        evaluate(saved, [long], progress=False)


def test_limit_bounds_the_tokens_of_each_file(saved, text, passages):
    rows = evaluate(saved, [text, passages], limit=10, progress=False)
    assert rows[str(text)]["tokens"] == 10
    assert rows[str(passages)]["passages"] == 1


def test_no_bar_is_drawn_where_stderr_is_no_terminal(saved, text, capfd):
    evaluate(saved, [text], progress=True)
    assert text.name not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context is 1; a window needs at least 2 tokens"),
        ({"context": 0}, "context is 0; a window needs at least 2 tokens"),
        ({"context": 65}, "context is 65, but this model reads at most 64 tokens"),
        ({"context": 8, "stride": 9}, "stride is 9; it must be 1 to the context, 8"),
        ({"stride": 0}, "stride is 0; it must be 1 to the context, 64"),
        ({"limit": 0}, "limit is 0 tokens; it must be at least 1"),
        ({"limit": -5}, "limit is -5 tokens; it must be at least 1"),
    ],
)
def test_impossible_settings_are_named(saved, text, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(saved, [text], progress=False, **options)


def test_files_are_looked_at_before_the_model_is_loaded(tmp_path, text):
    with pytest.raises(UserError, match="absent is not a folder"):
        evaluate(tmp_path / "absent", [], progress=False)
    with pytest.raises(UserError, match=r"absent\.txt is not a file"):
        evaluate(tmp_path / "absent", [text, tmp_path / "absent.txt"], progress=False)
    with pytest.raises(UserError, match="absent is not a folder"):
        evaluate(tmp_path / "absent", [text], progress=False)
