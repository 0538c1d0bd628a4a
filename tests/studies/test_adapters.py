"""The experiments with adapters, on a model and texts that take seconds: their rows, resuming, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from peerlm.data.tokenizer import train_tokenizer
from peerlm.errors import UserError
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm_studies import adapters, library
from peerlm_studies.rows import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

COUNTING = " ".join(str(number) for number in range(1500))
LETTERS = " ".join(chr(97 + number % 26) * (1 + number % 3) for number in range(3000))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model with dense layers and its tokenizer."""
    tokenizer = train_tokenizer([COUNTING, LETTERS], vocab_size=300)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = PeerForCausalLM(PeerConfig(**sizes, max_position_embeddings=32, ffw_layers="dense"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "counting.txt").write_text(COUNTING)
    (tmp_path / "letters.txt").write_text("\n<|endoftext|>\n".join([LETTERS, LETTERS.upper()]))
    return tmp_path


def test_adapters_are_compared_at_equal_flops_and_finished_rows_kept(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: adapters.METHODS[name] for name in ("pool of 256", "LoRA, rank 14")}
    monkeypatch.setattr(adapters, "METHODS", chosen)
    files = [saved / "counting.txt", saved / "letters.txt"]
    settings: dict[str, Any] = {"flops": 2e8, "limit": 100}
    output = saved / "rows.jsonl"
    lines: list[str] = []

    def compare(rates: list[float]) -> list[dict[str, Any]]:
        return adapters.compare_adapters(
            saved / "model", files[0], files, output, learning_rates=rates, report=lines.append, **settings
        )

    rows = compare([1e-2])
    assert [row["method"] for row in rows] == ["none", *adapters.METHODS]
    assert len(lines) == len(rows) == len(read_rows(output))
    base = rows[0]["perplexity"]["counting.txt"]
    for row in rows[1:]:
        assert row["perplexity"]["counting.txt"] < base
        spent = row["tokens"] * row["flops_per_token"]
        assert 0.5 * settings["flops"] < spent <= settings["flops"]
    assert rows[1]["trainable_parameters"] > rows[1]["active_parameters"]
    assert len(compare([1e-2, 2e-2])) == 2 * len(rows) - 1
    assert len(lines) == 2 * len(rows) - 1
    with pytest.raises(UserError, match=r"counting.txt has \d+ tokens, fewer than the \d+ of 1e\+12 FLOPs"):
        adapters.compare_adapters(saved / "model", files[0], files, output, flops=1e12, learning_rates=[1e-2])


def test_library_is_measured(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "WINDOW", 16)
    plain = library.read_some
    monkeypatch.setattr(
        library, "read_some", lambda files, tokenizer, number: plain(files, tokenizer, number, known_tokens=256)
    )
    options = [str(saved / "model"), str(saved / "letters.txt"), str(saved / "counting.txt")]
    options += ["--folder", str(saved / "library"), "--output", str(saved / "rows.jsonl")]
    options += ["--adapters", "3", "--trained", "2", "--layer", "1"]
    app = typer.Typer()
    app.command()(library.main)
    outcome = CliRunner().invoke(app, options, catch_exceptions=False)
    assert outcome.exit_code == 0
    (row,) = read_rows(saved / "rows.jsonl")
    assert json.loads(outcome.stdout) == row
    assert (row["adapters"], row["trained"]) == (3, 2)
    assert set(row["accuracy"]) == {"all", "counting", "letters"}
    assert row["accuracy"]["letters"]["adapters"] == 2
    assert row["accuracy"]["all"]["domain"] >= row["accuracy"]["all"]["first"] > 0.5
    assert row["perplexity"]["own"] < row["perplexity"]["base"]
    assert row["loads"] == 3
    names = {path.name for path in (saved / "library").iterdir() if path.is_dir()}
    assert names == {"counting-0000", "letters-0000", "letters-0001"}
    with pytest.raises(UserError, match="is there already; name a new folder"):
        library.measure_library(saved, [], saved / "library", saved, adapters=1, trained=1, layer=1)


def test_documents_are_cut_into_what_is_known_and_what_is_asked(saved: Path) -> None:
    tokenizer = train_tokenizer([COUNTING, LETTERS], vocab_size=300)
    files = [saved / "letters.txt", saved / "counting.txt"]
    found = library.read_some(files, tokenizer, 2, known_tokens=64, windows=2)
    assert [document.name for document in found] == ["letters-0000", "counting-0000"]
    for document in found:
        assert document.known.shape == (64,)
        assert document.asked.shape == (2, library.WINDOW)
    asked = tokenizer.decode(torch.cat(list(found[1].asked)))
    assert COUNTING.index(asked) >= len(COUNTING) * 4 // 5 - 1
