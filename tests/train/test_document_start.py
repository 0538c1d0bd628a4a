"""A model trained on documents that begin with a token of their own is read that way from then on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerlm.data import prepare
from peerlm.evaluate import load_model
from peerlm.marks import marks_of
from peerlm.train import TrainConfig, train


def test_training_and_evaluation_begin_documents_alike(
    make_tokenizer: Callable[..., Any], configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    make_tokenizer(template="<s> $A", bos="<s>").save_pretrained(tmp_path / "tokenizer")
    documents = ["river lantern moss quiet copper"] * 20 + ["winter orchard signal paper harbour"] * 20
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    for start, token in (("auto", 0), ("<pad>", 2), ("none", 1)):
        folder = tmp_path / f"data-{token}"
        source = [tmp_path / "text.txt"]
        prepare(source, folder, tokenizer=tmp_path / "tokenizer", holdout=0.3, document_start=start, progress=False)
        run = tmp_path / f"run-{token}"
        config = configure(
            run=str(run), data={"folder": str(folder)}, budget={"steps": 1}, model={"ffw_layers": "dense"}
        )
        train(config, progress=False)
        model, tokenizer = load_model(run)
        assert marks_of(model, tokenizer).start == (token,)
        assert model.config.bos_token_id == (None if start == "none" else token)
        assert marks_of(model, tokenizer).streamed == (start == "none")
