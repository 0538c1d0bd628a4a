import json

import pytest

from peerlm.cli import main
from peerlm.errors import UserError
from peerlm.evaluate import evaluate
from peerlm.evaluate.detokenize import detokenize


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 000 men , 3 @.@ 5 miles", "1,000 men, 3.5 miles"),
        ('He said : " Craig " ; then " Come in ! " .', 'He said: "Craig"; then "Come in!".'),
        ("Teddy 's story , the keepers ' house", "Teddy's story, the keepers' house"),
        ("did n't , don 't , they 've , I 'm", "didn't, don't, they've, I'm"),
        ("the film ( 2001 , [ sic ] ) .", "the film (2001, [sic])."),
        ("$ 5 , £ 6 and 7 %", "$5, £6 and 7%"),
        (" = Robert Boulter = \n \n Robert is . \n", "= Robert Boulter =\n\nRobert is.\n"),
        ("an <unk> word", "an <unk> word"),
    ],
)
def test_what_was_taken_apart_is_joined(tokenised, written) -> None:
    assert detokenize(tokenised) == written


@pytest.mark.parametrize(
    "text", ['Written text, as is: (well-known) "words", it\'s 3.5%.\n\nAnd a line.', "x = .5 and 'single' quotes"]
)
def test_written_text_stays(text) -> None:
    assert detokenize(text) == text


def test_figures_are_per_word_and_byte_of_the_tokenised_text(saved, tmp_path, capsys) -> None:
    wiki, book = tmp_path / "wiki.tokens", tmp_path / "book.txt"
    wiki.write_text("The old @-@ time keeper 's lamp , lit .\n")
    book.write_text("The old-time keeper's lamp, lit.\n")
    row = evaluate(saved, [wiki], detokenized=True, progress=False)[str(wiki)]
    plain = evaluate(saved, [book], progress=False)[str(book)]
    assert row["tokens"] == plain["tokens"]
    assert row["perplexity"] == plain["perplexity"]
    assert (row["words"], row["bytes"]) == (10, len(wiki.read_bytes().rstrip()))
    assert row["bits_per_byte"] == pytest.approx(plain["bits_per_byte"] * plain["bytes"] / row["bytes"])
    with pytest.raises(SystemExit):
        main(["eval", str(saved), str(wiki), "--detokenize", "--json", "-"])
    assert json.loads(capsys.readouterr().out)[str(wiki)] == row


def test_a_limit_does_not_go_with_it(saved, tmp_path) -> None:
    file = tmp_path / "wiki.tokens"
    file.write_text("Some words .\n")
    with pytest.raises(UserError, match="the limit is 9 tokens, but the words of detokenized text"):
        evaluate(saved, [file], detokenized=True, limit=9, progress=False)
