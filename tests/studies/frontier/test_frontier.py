"""The frontier of rows: what is on it, what a table and a plot say of it, and rows that do not compare."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peerlm import UserError
from peerlm.accounting import BYTES, model_cost
from peerlm.cli import main
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.terminal import print_markdown
from peerlm_studies.frontier.figures import plot_frontier
from peerlm_studies.frontier.points import budget_of, front, label_of, points_of
from peerlm_studies.frontier.study import frontier, frontier_of_study
from peerlm_studies.frontier.tables import frontier_markdown, frontier_rows
from peerlm_studies.isoflop.curves import Curve, Point
from peerlm_studies.isoflop.figures import plot_costs
from peerlm_studies.isoflop.fit import Optimum
from peerlm_studies.report.report import compose
from peerlm_studies.row_cost import read_bytes_per_token, row_bytes
from peerlm_studies.rows import append_row

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffw_layers": "peer"}


def row(k: int, sub_keys: int, loss: float, *, flops: float = 1e12, seed: int = 0, **summary: Any) -> dict[str, Any]:
    peer = {"num_experts": sub_keys**2, "heads": 1, "experts_per_head": k, "key_dim": 8}
    return {
        "key": f"{k} {sub_keys} {flops} {seed}",
        "method": f"{k} of {sub_keys}²",
        "label": f"{k} of {sub_keys}² flops={flops:g}",
        "seed": seed,
        "sweep": {"budget.flops": flops},
        "config": {
            "data": {"folder": "tokens", "vocab_size": 300, "context": 16, "batch_size": 4, "micro_batch_size": 2},
            "model": SIZES | {"peer": peer},
            "budget": {"steps": None, "flops": flops},
            "eval": {"final_windows": 8},
        },
        "summary": {
            "validation_loss": loss,
            "flops": flops,
            "total_parameters": 10_000,
            "seconds": 9.0,
            "cpu_seconds": 6.0 * k,
            "threads": 2,
            "device": "cpu",
            **summary,
        },
        "machine": {"processor": "x86_64", "cores": 2, "torch": "2.13.0"},
    }


ROWS = [
    row(4, 8, 3.5),
    row(4, 32, 3.2),
    row(8, 8, 3.0),
    row(8, 32, 3.1),
    row(16, 16, 3.05),
    row(16, 32, 2.9),
    row(4, 32, 2.8, flops=4e12),
]


def test_bytes_of_old_rows_are_those_of_their_model() -> None:
    config = PeerConfig(vocab_size=300, max_position_embeddings=16, **ROWS[0]["config"]["model"])
    cost = model_cost(PeerForCausalLM(config), 16)
    assert row_bytes(ROWS[0]) == {name: getattr(cost, name) for name in BYTES}
    assert read_bytes_per_token(ROWS[0]) == cost.read_bytes_per_token(2 * 16)
    assert cost.row_bytes_per_token == 2 * 4 * 2 * 32 * 4


def test_bytes_that_a_row_states_are_taken_and_those_of_grown_layers_are_not_known() -> None:
    stated = dict(zip(BYTES, range(100, 700, 100), strict=True))
    assert row_bytes(row(4, 8, 3.0, **stated)) == stated
    grown = row(4, 8, 3.0)
    grown["config"]["grow"] = {"at": "16@50%"}
    assert row_bytes(grown) is None is read_bytes_per_token(grown)
    unread = row(4, 8, 3.0)
    unread["config"]["model"]["ffw_layers"] = "of a later time"
    assert row_bytes(unread) is None


def test_the_front_has_what_no_other_beats() -> None:
    points = [point for point in points_of(ROWS) if point.budget == "1e+12 FLOPs"]
    assert [point.label for point in front(points, "bytes")] == ["4 of 32²", "8 of 8²", "16 of 32²"]
    for point in front(points, "bytes"):
        others = [other for other in points if other.costs["bytes"] < point.costs["bytes"]]  # type: ignore[operator]
        assert all(other.loss > point.loss for other in others)
    assert [point.label for point in front(points, "memory")] == ["8 of 8²", "16 of 32²"]


def test_seconds_compare_over_all_budgets_and_are_the_processors() -> None:
    points = points_of(ROWS)
    assert {point.label: point.costs["seconds"] for point in points}["16 of 16²"] == 48.0
    assert [(point.label, point.budget) for point in front(points, "seconds")] == [("4 of 32²", "4e+12 FLOPs")]
    mixed = points_of([*ROWS, row(32, 8, 2.0, device="cuda")])
    assert all(point.costs["seconds"] is None for point in mixed)
    assert "Seconds are left out" in frontier_markdown(mixed)


def test_seeds_are_one_point_with_an_interval() -> None:
    first, second = points_of([row(4, 8, 3.0), row(4, 8, 3.2, seed=1), row(8, 8, 2.9)])[::-1]
    assert (first.seeds, first.loss) == ((0, 1), pytest.approx(3.1))
    assert first.half_width is not None
    assert second.half_width == pytest.approx(first.half_width * math.sqrt(2))


def test_labels_leave_budgets_out() -> None:
    assert label_of(ROWS[0]) == "4 of 8²"
    assert label_of({"method": "PEER", "sweep": {"flops": "2e12", "size": "d64", "optim.learning_rate": 0.1}}) == (
        "PEER d64 learning_rate=0.1"
    )
    sized = [row(4, 8, 3.0), row(8, 8, 2.9)]
    for each in sized:
        each["sweep"] = {"flops": "1e12", "size": "d64"}
    assert [point.label for point in points_of(sized)] == ["8 of 8²", "4 of 8²"]
    sized[0]["sweep"]["size"] = "d32"
    assert [point.label for point in points_of(sized)] == ["8 of 8² d64", "4 of 8² d32"]
    assert budget_of({"config": {"budget": {"minutes": 5.0}}}) == "5 minutes"


def test_the_table_fits_80_columns_and_says_what_is_best() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_markdown(frontier_markdown(points_of(ROWS)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "│ 16 of 32² │ 18.2 │" in text  # a row for each setting
    flat = " ".join(text.split())
    kib = [f"{read_bytes_per_token(ROWS[place]) / 2**10:.3g}" for place in (1, 2, 5)]  # type: ignore[operator]
    assert f"from {kib[0]} KiB 4 of 32² (24.5), from {kib[1]} KiB 8 of 8² (20.1), from {kib[2]} KiB 16 of 32²" in flat
    assert "was not measured for 7 of 7 settings" in flat


def test_other_programs_are_named_where_they_were_measured() -> None:
    points = points_of([row(4, 8, 3.0, other_cores=0.0), row(8, 8, 2.9, other_cores=1.5)])
    assert "Other programs used the machine during 8 of 8²." in frontier_markdown(points)
    assert [each["disturbed"] for each in frontier_rows(points)] == [True, False]


def test_the_plot_names_the_front_and_joins_it() -> None:
    figure = plot_frontier(points_of(ROWS), ["bytes", "seconds"])
    over_bytes, over_seconds = figure.axes
    bold = {text.get_text() for text in over_bytes.texts if text.get_fontweight() == "bold"}
    assert bold == {"4 of 32²", "8 of 8²", "16 of 32²"}
    names = [name for text in over_bytes.texts for name in text.get_text().split("\n")]
    assert sorted(names) == sorted(each["method"] for each in ROWS)
    lines = [line for line in over_bytes.lines if line.get_linestyle() == "-"]
    assert [len(line.get_xdata()) for line in lines] == [3, 1]  # a front for each budget
    assert over_bytes.get_xscale() == over_bytes.get_yscale() == over_seconds.get_xscale() == "log"
    assert [text.get_text() for text in over_bytes.get_legend().get_texts()] == ["1e+12 FLOPs", "4e+12 FLOPs"]


def test_names_of_points_that_lie_on_each_other_stand_below_each_other() -> None:
    (axes,) = plot_frontier(
        points_of([row(4, 8, 3.0), row(4, 16, 3.5), row(4, 16, 3.499) | {"method": "4 of 32²"}])
    ).axes
    assert sorted(text.get_text() for text in axes.texts) == ["4 of 16²\n4 of 32²", "4 of 8²"]


def test_the_command_writes_table_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for each in ROWS:
        append_row(tmp_path / "rows.jsonl", each)
    with pytest.raises(SystemExit) as end:
        main(["frontier", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--json", "-"])
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/frontier.json").read_text())
    assert printed[0]["front"] == ["bytes", "decoding", "memory", "flops"]
    for name in ("frontier.png", "frontier_costs.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "4 of 32²" in (tmp_path / "out/frontier.md").read_text()


def test_rows_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="there are no rows at"):
        frontier([rows], tmp_path)
    rows.touch()
    with pytest.raises(UserError, match="has no rows yet"):
        frontier([rows], tmp_path)
    append_row(rows, ROWS[0])
    with pytest.raises(UserError, match="there is no method 'dense' in the rows: choose from 4 of 8²"):
        frontier([rows], tmp_path, methods=["dense"])
    other = json.loads(json.dumps(ROWS[1]))
    other["config"]["eval"]["final_windows"] = 64
    append_row(rows, other)
    with pytest.raises(UserError, match=r"losses of '4 of 8² .* do not compare"):
        frontier([rows], tmp_path)


def test_rows_of_different_studies_are_no_point_together() -> None:
    first, second = row(4, 8, 3.0), row(4, 8, 2.9, seed=1)
    assert [point.seeds for point in points_of([first, second, first])] == [(0, 1)]
    for changed, message in ((first, "has two runs of seed 0"), (second, "has runs of different models")):
        other = json.loads(json.dumps(changed))
        other["key"] = "another"
        other["config"]["model"]["kv_shift"] = True
        rows = [first, other] if changed is second else [first, second, other]
        with pytest.raises(UserError, match=rf"'4 of 8²' {message}.* at 1e\+12 FLOPs.*: name rows of one study"):
            points_of(rows)


def test_a_study_of_nothing_to_choose_has_no_frontier(tmp_path: Path) -> None:
    assert not frontier_of_study(ROWS[:1], tmp_path)
    grown = [json.loads(json.dumps(each)) for each in ROWS[:2]]
    for each in grown:
        each["config"]["grow"] = {"at": "16@50%"}
    assert not frontier_of_study(grown, tmp_path)
    other = json.loads(json.dumps(ROWS[1]))
    other["config"]["data"]["folder"] = "others"
    assert not frontier_of_study([ROWS[0], other], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert frontier_of_study(ROWS[:2], tmp_path)


def test_a_report_has_a_section_of_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    section = 'title = "The frontier"\nkind = "frontier"\nrows = ["rows.jsonl"]\ncommand = "peerlm compare f.toml"\n'
    (tmp_path / "report.toml").write_text(f'title = "Results"\n[[section]]\n{section}')
    _, markdown, figures = compose(tmp_path / "report.toml")
    assert list(figures) == ["the-frontier-frontier", "the-frontier-costs"]
    assert [len(figure.axes) for figure in figures.values()] == [1, 3]
    assert "| 16 of 32² | 18.2 |" in markdown


def test_costs_of_curves_have_bytes_where_they_are_known() -> None:
    points = [Point(size="d32", rows={0: each}, loss=each["summary"]["validation_loss"]) for each in ROWS[:2]]
    optimum = Optimum(place="too few sizes", size=None, loss=None, coefficients=None)
    for each in ROWS[:2]:
        each["summary"]["active_parameters"] = 1
    curves = [
        Curve(method=each["method"], flops=1e12, points=[point], optimum=optimum)
        for each, point in zip(ROWS, points, strict=False)
    ]
    figure = plot_costs(curves, lambda row: None)
    assert [axes.get_xlabel().split()[0] for axes in figure.axes] == ["training", "KiB"]
    read = [line.get_xdata()[0] * 2**10 for line in figure.axes[1].lines]  # type: ignore[index]
    assert read == [pytest.approx(read_bytes_per_token(each)) for each in ROWS[:2]]
