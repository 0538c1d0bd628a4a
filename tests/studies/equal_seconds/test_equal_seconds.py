"""Points in seconds become steps at measured speeds; speeds are measured once, and say whether others were at work."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from peerlm import UserError
from peerlm.cli import main
from peerlm.data import prepare
from peerlm.terminal import print_markdown
from peerlm.train.disturbance import OtherPrograms
from peerlm.train.recipe import to_dict
from peerlm_studies.adopt import adopt, adopt_speeds
from peerlm_studies.adopt import main as main_of_adopt
from peerlm_studies.equal_seconds import study
from peerlm_studies.equal_seconds.plan import SecondsPlan, load_seconds
from peerlm_studies.equal_seconds.plot import plot_seconds
from peerlm_studies.equal_seconds.tables import best_of_families, families, seconds_markdown
from peerlm_studies.report.plan import SectionConfig
from peerlm_studies.report.sections import make_section
from peerlm_studies.rows import append_row, read_rows

from ..recipes import DATA

RECIPE = (
    DATA
    + """[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[compare]
seeds = [0, 1]
[seconds]
points = [3, 1]
warm_up = 1
rounds = 2
[seconds.only]
PEER = [3]
[methods.dense.model]
ffw_layers = "dense"
[methods.PEER.model]
ffw_layers = "peer"
peer = {{ num_experts = 16, heads = 1, experts_per_head = 2, key_dim = 4 }}
"""
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def measured(others: float | None = 0.0) -> Any:
    """A stand-in for `measure_speed`: PEER's step takes twice dense's 0.1 s. It counts its calls."""

    def measure(train: Any, *, warm_up: int) -> dict[str, Any]:
        measure.calls += 1  # type: ignore[attr-defined]
        seconds = 0.2 if train.model["ffw_layers"] == "peer" else 0.1
        threads = torch.get_num_threads()
        return {"seconds_per_step": seconds, "spread": 0.0, "other_cores": others, "threads": threads, "machine": {}}

    measure.calls = 0  # type: ignore[attr-defined]
    return measure


def made(runs: Sequence[Any], compare: Any, output: Path, console: Console, *, shown: bool) -> None:
    """A stand-in for `make_rows`: more steps are better, PEER's more so, and seeds differ."""
    for run in runs:
        steps = run.train.budget.steps
        loss = 5 - math.log(steps) * (1.5 if run.method == "PEER" else 1) + 0.1 * run.seed
        summary: dict[str, Any] = {"validation_loss": loss, "steps": steps, "tokens": 64 * steps}
        if run.train.eval.copying:
            summary["copying"] = {"poor": loss + 0.5}
        row = {"key": run.key(compare), "method": run.method, "label": run.label, "seed": run.seed, "sweep": run.sweep}
        append_row(output / "rows.jsonl", row | {"config": to_dict(run.train), "summary": summary})


def stand_in(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    """Nothing is prepared, timed or trained: `measure` says the speeds."""
    monkeypatch.setattr(study, "measure_speed", measure)
    monkeypatch.setattr(study, "make_rows", made)
    monkeypatch.setattr(study, "prepare_data", lambda data, progress: None)


def test_points_become_steps_with_seeds_and_few_seconds_first(recipe: Path) -> None:
    runs = load_seconds(recipe).runs({"dense": 0.1, "PEER": 0.7})
    assert [(run.seconds, run.method, run.planned.seed, run.planned.train.budget.steps) for run in runs] == [
        (1.0, "dense", 0, 10),
        (1.0, "dense", 1, 10),
        (3.0, "dense", 0, 30),
        (3.0, "PEER", 0, 4),
        (3.0, "dense", 1, 30),
        (3.0, "PEER", 1, 4),
    ]
    assert runs[3].planned.label == "PEER seconds=3"
    with pytest.raises(UserError, match=r"has 3, and one step of PEER takes 3\.5 s: raise it"):
        load_seconds(recipe).runs({"dense": 0.1, "PEER": 3.5})


def test_a_study_measures_once_and_its_table_has_the_best_of_each_point(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measured()
    stand_in(monkeypatch, measure)
    table = study.equal_seconds(recipe, progress=False)
    assert measure.calls == 2
    assert [(row["seconds"], row["method"], row["steps"]) for row in table] == [
        (1.0, "dense", 10), (3.0, "dense", 30), (3.0, "PEER", 15),
    ]  # fmt: skip
    assert table[1]["loss"] == pytest.approx(5 - math.log(30) + 0.05)
    assert table[1]["half_width"] is not None
    assert table[1]["disturbed"] is False
    assert study.equal_seconds(recipe, progress=False) == table
    assert measure.calls == 2
    assert table == json.loads((tmp_path / "out/seconds.json").read_text())
    assert (tmp_path / "out/seconds.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out/seconds.md").read_text()
    assert "fewest targets repeat" not in text
    row = next(line for line in text.splitlines() if line.startswith("| PEER |  | "))
    assert row.startswith(f"| PEER |  | {table[2]['perplexity']:.1f} ± ")
    assert "* | 200.0 |" in row
    assert f"at speeds on cpu, {torch.get_num_threads()} threads." in text
    console = Console(file=io.StringIO(), width=80)
    print_markdown(text, console)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (1.5, "Other programs used the machine while speeds were measured of: dense, PEER."),
        (None, "Whether they did is not known of: dense, PEER."),
    ],
)
def test_other_programs_are_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: float | None, words: str
) -> None:
    stand_in(monkeypatch, measured(others))
    study.equal_seconds(recipe, progress=False)
    assert words in (tmp_path / "out/seconds.md").read_text()


def test_windows_with_little_to_copy_have_a_table_of_their_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, measured())
    table = study.equal_seconds(recipe, ["eval.copying=true"], progress=False)
    dense = table[1]
    assert dense["poor_loss"] == pytest.approx(dense["loss"] + 0.5)
    first, second = (tmp_path / "out/seconds.md").read_text().split("\nThe same in the half of the windows in which")
    assert "ms a step" in first
    assert "ms a step" not in second
    assert f"| dense | {math.exp(table[0]['poor_loss']):,.1f}* | {math.exp(dense['poor_loss']):,.1f} |" in second
    assert f"| PEER |  | {math.exp(table[2]['poor_loss']):,.1f}* |" in second


def test_families_are_compared_at_their_best_settings(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recipe.open("a") as file:
        file.write('\n[methods."PEER wide".model]\nffw_layers = "peer"\nhidden_size = 32\n')
        file.write("peer = { num_experts = 16, heads = 1, experts_per_head = 2, key_dim = 4 }\n")
    stand_in(monkeypatch, measured())
    table = study.equal_seconds(recipe, ["eval.copying=true"], progress=False)
    assert {row["method"]: row["family"] for row in table} == {"dense": "dense", "PEER": "PEER", "PEER wide": "PEER"}
    best = {family: [row["method"] for row in rows] for family, rows in best_of_families(table).items()}
    assert best == {"dense": ["dense", "dense"], "PEER": ["PEER wide", "PEER"]}
    whole, poor = (tmp_path / "out/seconds.md").read_text().split("\nThe same in the half of the windows")
    by_place = {(row["method"], row["seconds"]): row["loss"] for row in table}
    first = 100 * math.expm1(by_place["PEER wide", 1.0] - by_place["dense", 1.0])
    last = 100 * math.expm1(by_place["dense", 3.0] - by_place["PEER", 3.0])
    assert f"| dense | lowest | +{last:,.0f}% |" in whole
    assert f"| PEER | +{first:,.0f}% | lowest |" in whole
    assert "In brackets: by less than the intervals of both." in whole
    assert f"| PEER | +{first:,.0f}% | lowest |" in poor
    assert "In brackets" not in poor
    labels = [text.get_text() for text in plot_seconds(table).axes[0].get_legend().get_texts()]
    assert labels == ["dense", "PEER"]


def test_a_lead_within_the_intervals_is_in_brackets(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, measured())
    table = study.equal_seconds(recipe, ["seconds.points=[3]"], progress=False)
    dense, peer = table
    halves = math.hypot(dense["half_width"], peer["half_width"])
    for less, form in ((0.99, "({})"), (1.01, "{}")):
        dense["loss"] = peer["loss"] + less * halves
        above = f"+{100 * math.expm1(less * halves):,.0f}%"
        assert f"| dense | {form.format(above)} |" in seconds_markdown(table)
    assert "all have one seed" not in seconds_markdown(table)
    dense["half_width"] = None  # of which nothing is known
    assert f"| dense | {above} |" in seconds_markdown(table)
    later = [{**row, "seconds": 1500.0, "half_width": None} for row in table]
    assert " At 1500 seconds all have one seed, and no interval." in seconds_markdown([*table, *later])


def test_a_family_has_the_words_with_which_its_methods_begin() -> None:
    kinds = {"MoE fine d64": "moe", "MoE fine d96 spread": "moe", "a": "peer", "b": "peer", "c d": "dense"}
    assert families(kinds) == {
        "MoE fine d64": "MoE fine",
        "MoE fine d96 spread": "MoE fine",
        "a": "peer",
        "b": "peer",
        "c d": "c d",
    }


def test_families_whose_methods_begin_alike_are_told_apart() -> None:
    kinds = {"PEER d64": "peer", "PEER d96": "peer", "PEER and bigrams": "ngrams+peer", "PEER beside": "ngrams+peer"}
    assert [*families(kinds).values()] == ["PEER (peer)"] * 2 + ["PEER (ngrams+peer)"] * 2


def test_layers_beside_others_are_a_family_of_their_own(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recipe.open("a") as file:
        for kind in ("dense", "peer"):
            file.write(f'\n[methods."bigrams and {kind}".model]\nffw_layers = "hashed_ngrams+{kind}"\n')
            file.write("hashed_ngrams = { num_rows = 16, orders = [2] }\n")
            file.write("peer = { num_experts = 16, heads = 1, experts_per_head = 2, key_dim = 4 }\n" * (kind == "peer"))
    stand_in(monkeypatch, measured())
    table = study.equal_seconds(recipe, progress=False)
    assert {row["family"] for row in table} == {"dense", "PEER", "bigrams and dense", "bigrams and peer"}


def test_methods_take_turns_and_the_median_pass_counts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a slow minute of the machine meets all methods, and no single one for good."""
    turns: list[str] = []

    def measure(train: Any, *, warm_up: int) -> dict[str, Any]:
        turns.append(str(train.model["ffw_layers"]))
        seconds = [0.1, 0.4, 0.2, 0.3, 9.0][(len(turns) - 1) // 2]
        return {"seconds_per_step": seconds, "spread": 0.5, "steps": 2, "other_cores": seconds, "threads": 1}

    stand_in(monkeypatch, measure)
    plan = load_seconds(recipe, ["seconds.passes=5"])
    console = Console(file=io.StringIO(), width=80)
    speeds = study.measure_speeds(plan, console, progress=True)
    assert turns == ["dense", "peer"] * 5
    for speed in speeds.values():
        assert speed["seconds_per_step"] == speed["other_cores"] == 0.3
        assert speed["passes"] == [0.1, 0.4, 0.2, 0.3, 9.0]
        assert (speed["steps"], speed["spread"]) == (10, pytest.approx((0.4 - 0.2) / 0.3))
    assert "pass 4 of 5 is done" in console.file.getvalue()  # type: ignore[attr-defined]
    again = study.measure_speeds(plan, console, progress=True)
    assert [row["seconds_per_step"] for row in again.values()] == [0.3, 0.3]
    assert len(turns) == 10


def test_passes_that_were_stopped_go_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def measure(train: Any, *, warm_up: int) -> dict[str, Any]:
        if len(turns) == 3:
            raise KeyboardInterrupt
        turns.append(str(train.model["ffw_layers"]))
        return {"seconds_per_step": 0.1 * len(turns), "spread": 0.5, "steps": 2, "other_cores": None, "threads": 1}

    stand_in(monkeypatch, measure)
    plan, console = load_seconds(recipe, ["seconds.passes=2"]), Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        study.measure_speeds(plan, console, progress=False)
    assert len(read_rows(tmp_path / "out/passes.jsonl")) == 3
    assert [row["method"] for row in read_rows(tmp_path / "out/speeds.jsonl")] == ["dense"]
    monkeypatch.setattr(study, "measure_speed", lambda train, warm_up: {**measured()(train, warm_up=1), "steps": 2})
    speeds = study.measure_speeds(plan, console, progress=False)
    assert {method: row["passes"] for method, row in speeds.items()} == {
        "dense": [0.1, pytest.approx(0.3)],
        "PEER": [0.2, 0.2],
    }
    assert speeds["dense"]["seconds_per_step"] == pytest.approx(0.2)
    assert not (tmp_path / "out/passes.jsonl").exists()


def test_every_methods_own_text_is_prepared(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(study, "measure_speed", measured())
    monkeypatch.setattr(study, "prepare_data", lambda data, progress: prepared.append(data.folder))
    plan = load_seconds(recipe, [f"methods.PEER.data.folder={tmp_path}/other"])
    study.measure_speeds(plan, Console(quiet=True), progress=False)
    assert prepared == [f"{tmp_path}/tokens", f"{tmp_path}/other"]


def test_a_disturbed_speed_says_how_to_measure_it_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, measured(1.5))
    console = Console(file=io.StringIO(), width=500)
    study.measure_speeds(load_seconds(recipe), console, progress=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "dense: 100.0 ms a step; other programs used 1.5 cores meanwhile" in text
    assert "delete the row from speeds.jsonl" in text


def test_speeds_are_of_the_trainers_steps(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "text.txt").write_text("The keeper lit the lamp and went home. " * 60)
    prepare([tmp_path / "text.txt"], tmp_path / "tokens", vocab_size=300, holdout=0.2, progress=False)
    monkeypatch.setattr(OtherPrograms, "since", lambda self: 0.5)
    with pytest.raises(SystemExit) as end:
        main(["seconds", str(recipe), "--speeds", "--json", "-", "--set", "data.sources=['gone.txt']"])
    assert end.value.code == 0
    assert caplog.text.count("is prepared already") == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows == read_rows(tmp_path / "out/speeds.jsonl")
    assert [row["method"] for row in rows] == ["dense", "PEER"]
    for row in rows:
        assert row["steps"] == 2
        # others took 0.5 s of both steps, of which the median is the mean
        assert row["other_cores"] == pytest.approx(0.25 / row["seconds_per_step"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["speeds.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("points = [3, 1]", "points = []", r"seconds.points = \[\]: name at least one number above 0"),
        ("points = [3, 1]", "points = [3, 0]", "name at least one number above 0"),
        ("rounds = 2", "rounds = 0", "seconds.rounds = 0: at least 1"),
        ("rounds = 2", "rounds = 2\npasses = 0", "seconds.passes = 0: at least 1"),
        ("PEER = [3]", "PEER = [4]", r"seconds.only.PEER = \[4\]: give a list of some of \[3.0, 1.0\]"),
        ("PEER = [3]", "MoE = [3]", "seconds.only names 'MoE': choose from dense, PEER"),
        ("seeds = [0, 1]", 'sweep = { "model.hidden_size" = [16] }', "compare.sweep beside seconds.points"),
        ("[model]", "[budget]\nsteps = 3\n[model]", "sets a budget beside seconds.points"),
        (
            "[model]",
            "[grow]\nat = '8@50%'\n[model]",
            "dense has grow.at = '8@50%', and its speed, which is measured once, changes",
        ),
        ("[seconds]\npoints = [3, 1]\nwarm_up = 1\nrounds = 2\n[seconds.only]\nPEER = [3]\n", "", "no recipe of equal"),
    ],
)
def test_mistakes_are_named(recipe: Path, old: str, new: str, message: str) -> None:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_seconds(recipe)


@pytest.mark.parametrize(
    "otherwise", ['model.kv_shift_init = "spread"', "optim.learning_rate = 0.1", "optim.table_lr_multiplier = 5.0"]
)
def test_methods_that_start_or_step_otherwise_alone_have_one_speed(
    otherwise: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recipe.open("a") as file:
        file.write(f'\n[methods.mixed]\nmodel.ffw_layers = "dense"\n{otherwise}\n')
    measure = measured()
    stand_in(monkeypatch, measure)
    plan = load_seconds(recipe, ["model.kv_shift=true"])
    speeds = study.measure_speeds(plan, Console(quiet=True), progress=False)
    assert measure.calls == 2
    assert list(speeds) == ["dense", "PEER", "mixed"]
    assert speeds["mixed"] == speeds["dense"] != speeds["PEER"]
    assert plan.speeds(speeds.values()) == speeds
    runs = {run.method: run.planned.train.budget.steps for run in plan.runs({"dense": 0.1, "mixed": 0.1})}
    assert runs["mixed"] == runs["dense"]


def test_a_speed_that_is_measured_again_makes_runs_of_their_own(recipe: Path) -> None:
    folders = {
        run.planned.train.run
        for seconds in (0.1, 0.11)
        for run in load_seconds(recipe, ["compare.seeds=[0]"]).runs({"dense": seconds})
    }
    assert len(folders) == 4


def test_speeds_are_of_one_number_of_threads(recipe: Path) -> None:
    plan = load_seconds(recipe)

    def measured_with(threads: int, *methods: str) -> list[dict[str, Any]]:
        return [{"key": plan.speed_key(method, threads), "threads": threads} for method in methods]

    both = [*measured_with(1, "dense", "PEER"), *measured_with(2, "dense"), *measured_with(4, "dense", "PEER")]
    assert {method: row["threads"] for method, row in plan.speeds(both).items()} == {"dense": 4, "PEER": 4}
    assert list(plan.speeds(measured_with(2, "dense"))) == ["dense"]
    assert plan.speeds([]) == {}
    with pytest.raises(UserError, match=r"speeds were measured with \[1, 2\] threads: keep the rows of one number"):
        plan.speeds([*measured_with(2, "dense"), *measured_with(1, "PEER")])


def test_a_speed_is_known_by_what_it_depends_on(recipe: Path) -> None:
    plan: SecondsPlan = load_seconds(recipe)
    keys = {plan.speed_key("dense", 2), plan.speed_key("dense", 1), plan.speed_key("PEER", 2)}
    for change in ("data.context=8", "seconds.rounds=3", "seconds.passes=3"):
        keys.add(load_seconds(recipe, [change]).speed_key("dense", 2))
    for change in ("tables.folder='rows'", "parallel.rows=2", "graph='off'"):
        keys.add(load_seconds(recipe, [change]).speed_key("dense", 2))
    assert len(keys) == 9
    assert load_seconds(recipe, ["seconds.points=[5, 3]"]).speed_key("dense", 2) == plan.speed_key("dense", 2)


def test_rows_and_speeds_from_elsewhere_make_a_section_of_a_report(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, measured())
    table = study.equal_seconds(recipe, [f"data.folder={tmp_path}/elsewhere", "seconds.points=[3]"], progress=False)
    out, results, speeds = tmp_path / "out", tmp_path / "rows.jsonl", tmp_path / "speeds.jsonl"
    main_of_adopt(out / "rows.jsonl", recipe, results, speeds=out / "speeds.jsonl", speeds_output=speeds)
    assert len(read_rows(speeds)) == 2
    assert len(read_rows(results)) == 4
    assert "elsewhere" not in results.read_text() + speeds.read_text()
    assert adopt_speeds(out / "speeds.jsonl", recipe, speeds) == 0
    assert adopt_speeds(out / "speeds.jsonl", recipe, tmp_path / "of-passes.jsonl", ["seconds.passes=5"]) == 0
    assert adopt(out / "rows.jsonl", recipe, results, speeds=speeds) == (0, [])
    plan = {"title": "At equal seconds", "kind": "seconds", "recipe": "recipe.toml", "command": "peerlm seconds"}
    section = make_section(SectionConfig(**plan, rows=("rows.jsonl",), speeds="speeds.jsonl"), tmp_path)
    note, markdown = section.tables
    assert note == "2 of the recipe's 6 runs were not made, and are not in tables and plots: dense (1 s)."
    assert f"| {table[1]['perplexity']:.1f} ± " in markdown
    assert list(section.figures) == ["seconds"]
    results.write_text("".join(results.read_text().splitlines(keepends=True)[1:]))
    section = make_section(SectionConfig(**plan, rows=("rows.jsonl",), speeds="speeds.jsonl"), tmp_path)
    assert section.tables[0].startswith("3 of the recipe's 6 runs were not made")
    assert section.tables[0].endswith(": dense (1 s, 3 s with seed 0).")
    assert make_section(SectionConfig(**plan, rows=("none.jsonl",), speeds="speeds.jsonl"), tmp_path).rows == []


def test_what_adopting_lacks_is_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no speeds at .*none: name a file that peerlm seconds --speeds"):
        adopt_speeds(tmp_path / "none", recipe, tmp_path / "speeds.jsonl")
    with pytest.raises(UserError, match="--speeds and --speeds-output belong together"):
        main_of_adopt(tmp_path, recipe, tmp_path, speeds=tmp_path)
