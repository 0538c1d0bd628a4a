"""The windows that an inspection reads begin as documents do."""

import pytest
import torch

from peerlm.evaluate import held_out_loss, load_model
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.windows import begin_windows
from peerlm.interpret import Edit, change_of_edits, inspect

WORDS = "river lantern moss quiet copper ladder winter orchard signal paper harbour tin violet " * 4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("start", "begins"), [("auto", "<s>"), ("none", None), ("</s>", "</s>")])
def test_windows_begin_as_documents_do(make_tokenizer, new_model, tmp_path, start, begins):
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")
    for part in (new_model(vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(WORDS)
    options = {"context": 8, "limit": 40, "document_start": start, "progress": False}
    figures = inspect(tmp_path / "model", tmp_path / "text.txt", edits=0, **options)
    change = change_of_edits(tmp_path / "model", tmp_path / "text.txt", [Edit(1, 0, 0.0)], **options)
    model, loaded = load_model(tmp_path / "model")
    tokens = encode(loaded, [WORDS]).documents[0]
    if start == "auto":
        tokens = begin_windows(tokens, 8, (0,))
    elif start == "</s>":
        tokens = torch.cat([torch.tensor([1]), tokens])
    expected = held_out_loss(model, tokens[:40].view(5, 8), batch_size=5)
    assert figures["document_start"] == change["document_start"] == begins
    assert figures["loss"] == pytest.approx(expected)
    assert change["loss"] == pytest.approx(expected)
