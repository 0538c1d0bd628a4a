"""An isoFLOP recipe becomes its runs; its rows become curves, optima and tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm_studies.comparison.plan import load_plan
from peerlm_studies.isoflop.curves import curves_of, equal_loss_table, equal_seconds_table, optima_table
from peerlm_studies.isoflop.figures import plot_costs
from peerlm_studies.isoflop.plan import load_isoflop
from peerlm_studies.isoflop.seconds import comparable_seconds, seconds_at_speeds, seconds_of
from peerlm_studies.isoflop.study import isoflop
from peerlm_studies.isoflop.tables import equal_loss_markdown, equal_seconds_markdown, optima_markdown
from peerlm_studies.rows import read_rows


def test_all_runs_are_made_then_more_seeds_at_the_optimum(study: Any, made: list[str]) -> None:
    table = isoflop(study.path, progress=False)
    assert len(made) == 2 * 2 * 3 + 2 * 2 * 2
    # the optimum lies at 2e6 parameters for 1e9 FLOPs, and nearer to 2e6 than to 4e6 for 4e9: at 2e6 * sqrt(2)
    more = made[12:]
    assert {label.rpartition(" ")[2] for label in more} == {"1", "2"}
    assert {label.split("size=")[1].split()[0] for label in more if "flops=1e9" in label} == {"middle"}
    assert [row["seeds"] for row in table] == [[0, 1, 2]] * 4
    for row in table:
        assert row["place"] == "inside"
        factor = math.sqrt(2) if row["flops"] == 4e9 else 1
        assert row["optimum_parameters"] == pytest.approx(2e6 * factor)
        expected = study.loss_of(row["method"], row["flops"], {"middle": 32, "large": 64}[row["size"]], 1)
        assert row["loss"] == pytest.approx(expected)
    made.clear()
    assert isoflop(study.path, progress=False) == table
    assert made == []
    output = study.plan.output
    assert json.loads((output / "isoflop.json").read_text())["optima"] == table
    assert "| 1e+09 | PEER | 2.00M |" in (output / "isoflop.md").read_text()
    for plot in ("curves.png", "costs.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_study_can_be_made_again(study: Any, made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    table = isoflop(study.path, methods=["PEER"], budgets=["1e9"], sizes=["small"], seeds=[7])
    assert made == ["PEER flops=1e9 size=small 7"]
    assert [(row["label"], row["seeds"]) for row in table] == [("PEER flops=1e9 size=small", [7])]
    assert f"{table[0]['perplexity']['validation']['mean']:,.1f}" in capsys.readouterr().out
    assert not (study.plan.output / "isoflop.json").exists()


def test_a_run_has_the_key_that_a_comparison_gives_it(study: Any, tmp_path: Path) -> None:
    text = study.path.read_text()
    shared, methods = text.split("[isoflop]")[0], "[methods" + text.split("[methods", 1)[1]
    sweep = '[compare.sweep]\n"model.hidden_size" = [16, 32, 64]\n[budget]\nflops = 4e9\n'
    (tmp_path / "compare.toml").write_text(shared + sweep + methods)
    compared = load_plan(tmp_path / "compare.toml")
    plan = study.plan
    keys = {run.planned.key(plan.compare) for run in plan.runs() if run.flops == 4e9}
    assert {run.key(compared.compare) for run in compared.runs} == keys
    assert len(keys) == 6


def test_runs_of_a_study_have_folders_of_their_own(study: Any) -> None:
    runs = study.plan.runs([0, 1])
    assert len({run.planned.train.run for run in runs}) == len(runs) == 24
    assert [run.flops for run in runs] == [1e9] * 12 + [4e9] * 12


def test_intervals_are_of_seeds_pooled_over_all_runs_of_a_budget(study: Any) -> None:
    rows = study.rows([0]) + [row for row in study.rows([1, 2]) if "size=middle" in row["label"]]
    for row in rows:
        if row["sweep"]["flops"] == "4e9":
            row["summary"]["validation_loss"] += 10 * row["seed"]
    table = optima_table(curves_of(study.plan, rows), seconds_of)
    row = next(row for row in table if row["size"] == "middle" and row["flops"] == 1e9)
    # two groups of three seeds, each of standard deviation 0.01: 4 degrees of freedom, t = 2.776
    assert row["loss_half_width"] == pytest.approx(2.776 * 0.01 / math.sqrt(3), rel=1e-3)
    other = row["perplexity"]["other"]
    assert other["mean"] == pytest.approx(math.exp(row["loss"] + 1))
    assert other["half_width"] == pytest.approx(other["mean"] * row["loss_half_width"])
    shown = optima_markdown(table)
    assert f"{row['loss']:.3f} ± {row['loss_half_width']:.3f}" in shown
    # Seeds of the other budget differ by more than their loss.
    wide = [row for row in table if row["flops"] == 4e9]
    lines = [line for line in shown.splitlines() if line.startswith("| 4e+09 |")]
    assert len(lines) == len(wide) > 0
    for row, line in zip(wide, lines, strict=True):
        assert 2 * row["loss_half_width"] > row["loss"]
        assert "| no estimate |" in line
        assert f"{row['loss']:.3f} ±" not in line
    assert '"no estimate": the interval is wider than the value.' in shown


def test_one_seed_has_no_interval_and_missing_rows_leave_gaps(study: Any) -> None:
    rows = [
        row for row in study.rows([0]) if "size=large" not in row["label"] and "dense flops=4e9" not in row["label"]
    ]
    table = optima_table(curves_of(study.plan, rows), seconds_of)
    assert len(table) == 3
    assert {row["place"] for row in table} == {"too few sizes"}
    assert all(row["loss_half_width"] is None for row in table)
    assert "| too few sizes |" in optima_markdown(table)


def test_a_curve_of_an_unfinished_study_compares_sizes_and_no_seeds(study: Any) -> None:
    study.path.write_text(study.path.read_text().replace("[compare]", "[compare]\nseeds = [0, 5]"))
    rows = [row for row in study.rows([0, 5]) if row["seed"] == 0 or "size=small" in row["label"]]
    curve = curves_of(study.plan, rows)[0]
    assert curve.optimum.size == pytest.approx(2e6)
    expected = [study.loss_of("dense", 1e9, width, 0) for width in (16, 32, 64)]
    assert [point.loss for point in curve.points] == pytest.approx(expected)


def test_sizes_that_are_none_are_named(study: Any) -> None:
    rows = study.rows([0])
    for row in rows:
        row["summary"]["active_parameters"] = 7
    with pytest.raises(UserError, match="sizes 'small' and 'middle' of dense both have 7 active parameters"):
        curves_of(study.plan, rows)


def test_equal_seconds_are_read_from_frontiers(study: Any) -> None:
    table = equal_seconds_table(curves_of(study.plan, study.rows([0])), seconds_of)
    assert table["seconds"][0] == pytest.approx(20)  # PEER's quickest run; dense's slowest takes 40
    assert table["seconds"][-1] == pytest.approx(40)
    assert len(table["seconds"]) == 4
    assert table["losses"]["dense"][-1] == pytest.approx(min(study.loss_of("dense", 4e9, size, 0) for size in (32, 64)))
    assert table["losses"]["PEER"][0] == pytest.approx(study.loss_of("PEER", 1e9, 32, 0))
    assert "| method | loss at 20 s | loss at 25 s |" in equal_seconds_markdown(table)


def test_without_common_seconds_nothing_is_compared(study: Any) -> None:
    apart = ("dense flops=1e9", "PEER flops=4e9")
    rows = [row for row in study.rows([0]) if row["label"].startswith(apart)]
    table = equal_seconds_table(curves_of(study.plan, rows), seconds_of)
    assert table["seconds"] == []
    assert "No range of seconds" in equal_seconds_markdown(table)


def test_unknown_seconds_are_not_drawn(study: Any) -> None:
    curves = curves_of(study.plan, study.rows([0]))
    for cost, panels in ((seconds_of, 2), (lambda row: None, 1)):
        figure = plot_costs(curves, cost)
        figure.draw_without_rendering()
        assert len(figure.axes) == panels


def test_an_equal_loss_costs_what_frontiers_say(study: Any) -> None:
    curves = curves_of(study.plan, study.rows([0]))
    dense, peer = equal_loss_table(curves, seconds_of)
    best = min(study.loss_of("dense", 4e9, size, 0) for size in (32, 64))  # the worse method's best
    assert (dense["method"], dense["loss"], dense["flops"]) == ("dense", pytest.approx(best), pytest.approx(4e9))
    low, high = (min(study.loss_of("PEER", flops, size, 0) for size in (32, 64)) for flops in (4e9, 1e9))
    assert peer["flops"] == pytest.approx(1e9 * 4 ** ((high - best) / (high - low)))
    assert peer["seconds"] == pytest.approx(2 * peer["flops"] / 1e8)
    assert "| PEER | " in equal_loss_markdown([dense, peer])
    assert equal_loss_table([], seconds_of) == []
    assert "No loss was reached" in equal_loss_markdown([])


def test_seconds_are_the_processors_where_it_trained() -> None:
    summary = {"seconds": 9.0, "cpu_seconds": 8.0, "threads": 2, "device": "cpu"}
    assert seconds_of({"summary": summary}) == 4.0
    assert seconds_of({"summary": summary | {"device": "cuda:0"}}) == 9.0


def test_seconds_of_different_processors_do_not_compare(study: Any) -> None:
    rows = study.rows([0])
    assert comparable_seconds(rows)(rows[0]) == seconds_of(rows[0])
    rows[0]["summary"] |= {"device": "cuda:0", "seconds": 0.5}
    assert comparable_seconds(rows)(rows[0]) is None
    assert comparable_seconds(rows[:1])(rows[0]) == 0.5


def test_speeds_say_what_runs_cost_wherever_they_were_made(study: Any) -> None:
    rows = study.rows([0, 1])
    batch_size = study.plan.runs()[0].planned.train.data.batch_size
    smallest = {(run.method, run.size): run for run in study.plan.runs(budgets=["1e9"])}
    speeds = [
        {
            "key": run.planned.key(study.plan.compare),
            "batch_size": windows,
            "threads": 2,
            "train_seconds": seconds * windows,
        }
        for run, seconds in zip(smallest.values(), range(1, 6), strict=False)  # the last of the six has none
        for windows in (batch_size, batch_size + 1)
    ]
    cost = seconds_at_speeds(study.plan, [*speeds, {**speeds[0], "key": "another recipe's", "threads": 3}])
    places = {run.planned.key(study.plan.compare): run for run in study.plan.runs(study.plan.all_seeds)}
    order = list(smallest)
    for row in rows:
        row["summary"]["device"] = "cuda:0"
        number = order.index((places[row["key"]].method, places[row["key"]].size)) + 1
        expected = None if number == 6 else pytest.approx(number * batch_size * row["summary"]["tokens"])
        assert cost(row) == expected
    assert cost({"key": "another", "summary": {"tokens": 1}}) is None
    with pytest.raises(UserError, match=r"speeds were measured with \[2, 3\] threads: keep the rows of one number"):
        seconds_at_speeds(study.plan, [*speeds, {**speeds[0], "threads": 3}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("isoflop.sizes.small=3", 'isoflop.sizes.small = 3: write { "model.hidden_size" = 128 }'),
        ("isoflop.budgets.many=['small']", "isoflop.budgets has 'many': name a number of FLOPs"),
        ("isoflop.budgets.1e9='small'", "isoflop.budgets.1e9 = 'small': give a list of names of sizes"),
        ("isoflop.budgets.1e9=['tiny']", "isoflop.budgets.1e9 names 'tiny': choose from small, middle, large"),
        ("isoflop.budgets={}", "isoflop.budgets is empty"),
        ("isoflop.only.moe.1e9=['small']", "isoflop.only names 'moe': choose from dense, PEER"),
        ("isoflop.only.PEER.1e8=['small']", "isoflop.only.PEER.1e8 names no budget: choose from 1e9, 4e9"),
        ("isoflop.only.PEER.1e9='small'", "isoflop.only.PEER.1e9 = 'small': give a list of names of sizes"),
        ("isoflop.only.PEER.1e9=['tiny']", "isoflop.only.PEER.1e9 names 'tiny': choose from small, middle, large, or"),
        ("isoflop.bugets.x=1", "unknown key 'isoflop.bugets'"),
        ("isoflop={}", "is no isoFLOP recipe: add a section [isoflop]"),
        ("budget.steps=3", "sets a budget beside isoflop.budgets"),
        ("compare.sweep.seed=[3]", "has compare.sweep beside isoflop.sizes"),
        ("isoflop.sizes.small={seed = 3}", "the recipe has seed = 3"),
        ("methods.PEER={model = {ffw_layers = 'dense'}, graph = 'off'}", "are one run: they differ in nothing"),
    ],
)
def test_mistakes_are_named(study: Any, change: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_isoflop(study.path, [change])
    assert message in str(error.value)


@pytest.mark.parametrize(("part", "message"), [("method", "rival"), ("budget", "1e10"), ("size", "huge")])
def test_a_part_that_is_not_there_is_named(study: Any, part: str, message: str) -> None:
    with pytest.raises(UserError, match=f"there is no {part} '{message}': choose from"):
        study.plan.runs(**{f"{part}s": [message]})


def test_a_part_without_runs_is_named(study: Any) -> None:
    study.path.write_text(study.path.read_text().replace('"4e9" = ["small", ', '"4e9" = ['))
    with pytest.raises(UserError, match=r"no run of .* has that budget and that size"):
        isoflop(study.path, budgets=["4e9"], sizes=["small"], progress=False)


def test_a_method_may_have_fewer_sizes(study: Any) -> None:
    plan = load_isoflop(study.path, ["isoflop.only.PEER.1e9=['small']", "isoflop.only.PEER.4e9=[]"])
    everywhere = load_isoflop(study.path).runs()
    assert [(run.flops, run.size) for run in plan.runs(methods=["PEER"])] == [(1e9, "small")]
    assert plan.runs(methods=["dense"]) == [run for run in everywhere if run.method == "dense"]
    assert plan.runs(whole=True) == everywhere


def test_rows_of_a_stranger_do_not_count(study: Any) -> None:
    rows = study.rows([0])
    assert curves_of(study.plan, [{**row, "key": "another"} for row in rows]) == []
    assert read_rows(study.plan.output / "rows.jsonl") == []


def test_the_command_passes_its_part_on(study: Any, made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    part = ["--method", "dense", "--budget", "4e9", "--size", "large", "--seed", "3", "--json=-"]
    with pytest.raises(SystemExit) as end:
        main(["isoflop", str(study.path), *part])
    assert end.value.code == 0
    assert made == ["dense flops=4e9 size=large 3"]
    out = capsys.readouterr().out
    assert [row["seeds"] for row in json.loads(out)] == [[3]]


def test_the_keys_of_one_size_are_not_anothers(study: Any) -> None:
    small = 'isoflop.sizes.small={"model.hidden_size" = 16, "optim.learning_rate" = 0.5}'
    plan = load_isoflop(study.path, ["optim.warmup=0.1", small])
    rates = {run.size: run.planned.train.optim.learning_rate for run in plan.runs()}
    assert rates == {"small": 0.5, "middle": 3e-3, "large": 3e-3}
