"""Tables say the mean and spread over seeds, and nothing else than the rows."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from peerlm_studies.comparison.tables import columns_of, markdown_table, show_table, summarise


def row(label: str, seed: int, loss: float, *, usage: float | None = None) -> dict[str, Any]:
    return {
        "label": label,
        "method": label,
        "seed": seed,
        "sweep": {},
        "summary": {
            "validation_loss": loss,
            "total_parameters": 2_000_000,
            "active_parameters": 500_000,
            "tokens": 1000 * (seed + 1),
            "flops": 1e12,
            "seconds": 10.0,
            "tokens_per_second": 100.0,
            "peak_memory_bytes": 2**20,
            "usage": {} if usage is None else {"layer": {"share": usage, "unevenness": 0.5}},
        },
        "evaluation": {"book.txt": {"perplexity": 20.0 + seed}, "last.jsonl": {"perplexity": 5.0, "accuracy": 0.25}},
        "machine": {"cores": 2, "torch": "2.13.0"},
        "date": "2026-01-02",
    }


ROWS = [row("dense", 0, math.log(30)), row("PEER", 0, math.log(20), usage=0.5), row("dense", 1, math.log(34))]


def test_means_and_spreads_are_over_seeds() -> None:
    dense, peer = summarise(ROWS)
    assert dense["seeds"] == [0, 1]
    assert dense["perplexity"]["validation"]["mean"] == pytest.approx(32)
    assert dense["perplexity"]["validation"]["spread"] == pytest.approx(math.sqrt(8))
    assert dense["perplexity"]["book.txt"]["mean"] == pytest.approx(20.5)
    assert dense["tokens"] == 1500
    assert dense["usage"] is None
    assert peer["perplexity"]["validation"] == {"mean": pytest.approx(20), "spread": None}
    assert peer["usage"] == 0.5
    assert peer["accuracy"] == {"last.jsonl": {"mean": 0.25, "spread": None}}


def test_a_loss_beyond_what_has_a_perplexity_has_a_row_without_a_mean() -> None:
    [peer] = summarise([row("PEER", 0, 1000.0, usage=0.5)])
    assert peer["perplexity"]["validation"]["mean"] is None


def test_markdown_names_command_seeds_machine_and_date() -> None:
    text = markdown_table(summarise(ROWS), command="peerlm compare x.toml", rows=ROWS)
    lines = text.splitlines()
    titles = ["method", "validation ppl", "book.txt ppl", "last.jsonl ppl", "last.jsonl acc", "parameters", "active"]
    assert lines[0].startswith("| " + " | ".join(titles) + " |")
    assert lines[2].startswith("| dense | 32.0 ± 2.8 | 20.5 ± 0.7 | 5.0 ± 0.0 | 25.0% ± 0.0% | 2.00M | 0.50M")
    assert lines[3].startswith("| PEER | 20.0 | 20.0 | 5.0 | 25.0% |")
    assert lines[3].endswith("| 50.0% | 0.50 |")
    assert lines[5] == (
        "`peerlm compare x.toml`; seeds 0, 1, ± is the standard deviation over them; 2 cores, torch 2.13.0; 2026-01-02."
    )


def test_what_runs_copied_has_columns_where_it_was_measured() -> None:
    found = {
        "poor": math.log(40),
        "rich": None,
        "repeats": math.log(6),
        "first_half": 8.5,
        "second_half": 6.25,
        "first_token": {"0": 0.1, "1": 0.3},
    }
    early = {"tokens": 1_000_000, "copying": found | {"second_half": 8.41}}
    begun = {"tokens": 2_000_000, "copying": found | {"second_half": 8.375}}
    last = {"tokens": 3_000_000, "copying": found}
    measured = row("PEER", 0, math.log(20)) | {"curve": [{"tokens": 0}, early, begun, last]}
    table = summarise([row("dense", 0, math.log(30)), measured])
    assert [entry["copying"] for entry in table] == [
        {},
        {
            "poor ppl": {"mean": pytest.approx(40), "spread": None},
            "repeats ppl": {"mean": pytest.approx(6), "spread": None},
            "copied nats": {"mean": 2.25, "spread": None},
            "copies from": {"mean": 2.0, "spread": None},
            "to first token": {"mean": 0.3, "spread": None},
        },
    ]
    columns = columns_of(table)
    assert columns["poor ppl"] == ["", "40.0"]
    assert columns["copied nats"] == ["", "2.25"]
    assert columns["copies from"] == ["", "2.0M"]
    assert columns["to first token"] == ["", "0.30"]
    assert "rich ppl" not in columns
    assert "poor ppl" not in columns_of(table[:1])


def test_a_model_that_copies_nothing_has_no_tokens_from_which_on_it_does() -> None:
    found = {"poor": 1.0, "rich": 1.0, "repeats": None, "first_half": 8.0, "second_half": 7.95, "first_token": {}}
    (entry,) = summarise([row("PEER", 0, 1.0) | {"curve": [{"tokens": 10, "copying": found}]}])
    assert "copies from" not in entry["copying"]
    assert "repeats ppl" not in entry["copying"]
    assert entry["copying"]["copied nats"]["mean"] == pytest.approx(0.05)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_shows_every_method_whole(width: int) -> None:
    screen = io.StringIO()
    show_table(summarise(ROWS), Console(file=screen, width=width))
    text = screen.getvalue()
    for part in ("dense", "PEER", "32.0 ± 2.8", "validation ppl"):
        assert part in text
    assert max(map(len, text.splitlines())) <= width
    quiet = io.StringIO()
    show_table(summarise(ROWS), Console(file=quiet, quiet=True))
    assert quiet.getvalue() == ""
