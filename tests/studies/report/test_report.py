"""A report is what its rows give, byte for byte, and says where there are none."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import matplotlib as mpl
import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm_studies.report.report import compose, report

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEFINITION = """
title = "Small"
intro = "Of nothing much."
[[section]]
title = "Curves & sizes"
kind = "isoflop"
recipe = "isoflop.toml"
rows = ["rows.jsonl"]
command = "peerlm isoflop isoflop.toml"
question = "Which size?"
says = "The middle one."
[[section]]
title = "By label"
kind = "comparison"
rows = ["rows.jsonl"]
command = "peerlm compare c.toml"
[[section]]
title = "Over a setting"
kind = "comparison"
rows = ["rows.jsonl"]
command = "peerlm compare c.toml"
plot = { x = ["eval.windows", "eval.final_windows"], xlabel = "windows" }
[[section]]
title = "Seconds"
kind = "table"
rows = ["cost.jsonl"]
command = "python -m cost"
columns = ["kind", "batch", "cost.seconds"]
plot = { x = ["batch"], by = ["kind"], y = "cost.seconds" }
[[section]]
title = "Not yet"
kind = "comparison"
rows = ["later.jsonl"]
command = "peerlm compare later.toml"
"""
COST = [{"kind": "dense", "batch": 1000 * n, "cost": {"seconds": n / 3}, "machine": None} for n in (1, 2)]


@pytest.fixture
def folder(study: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the study's recipe, its rows and the definition; the working directory."""
    folder: Path = study.path.parent
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in study.rows([0, 1])))
    (folder / "cost.jsonl").write_text("".join(json.dumps(row) + "\n" for row in COST))
    (folder / "report.toml").write_text(DEFINITION)
    return folder


def test_the_same_rows_give_the_same_bytes(folder: Path) -> None:
    files = report("report.toml", "one")
    assert [path.name for path in files] == [path.name for path in report("report.toml", "two")]
    plots = {"curves-sizes-curves", "curves-sizes-costs", "by-label-perplexity", "over-a-setting-perplexity"}
    assert {path.stem for path in files if path.suffix == ".svg"} == plots | {"seconds-cost-seconds"}
    for path in files:
        assert path.read_bytes() == Path("two", *path.parts[1:]).read_bytes(), path


def test_every_section_has_its_table_its_plot_and_where_it_is_from(folder: Path) -> None:
    _, markdown, _ = compose("report.toml")
    assert markdown.startswith("# Small\n\nOf nothing much.\n\n## Curves & sizes\n\nWhich size?\n\n| FLOPs |")
    assert (
        "The middle one.\n\n`peerlm isoflop isoflop.toml`; rows in `rows.jsonl`; seeds 0, 1; 2 cores (x86_64)"
        in markdown
    )
    assert 'again, alone: `peerlm isoflop isoflop.toml --method "PEER" --budget 4e9 --size ' in markdown
    assert "![costs](results/curves-sizes-costs.svg)" in markdown
    assert "| dense flops=1e9 size=small | " in markdown
    assert "| kind | batch | seconds |\n|---|---|---|\n| dense | 1,000 | 0.3333 |" in markdown
    assert markdown.endswith("## Not yet\n\nNo rows yet: `peerlm compare later.toml` makes them.\n")


def test_seconds_are_those_of_speeds_where_there_are_some(folder: Path, study: Any) -> None:
    Path("report.toml").write_text(
        DEFINITION.replace('rows = ["rows.jsonl"]', 'rows = ["rows.jsonl"]\nspeeds = "speed.jsonl"', 1)
    )
    assert "The same rows at equal seconds of training:" in compose("report.toml")[1]
    runs = study.plan.runs(budgets=["1e9"])
    of_runs = {"batch_size": runs[0].planned.train.data.batch_size, "threads": 2, "train_seconds": 1e-3}
    rows = [{"key": run.planned.key(study.plan.compare), **of_runs} for run in runs]
    Path("speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, markdown, _ = compose("report.toml")
    assert ", at the speed of each method and size on 2 threads of a CPU (`speed.jsonl`):" in markdown
    tokens = study.rows([0])[0]["summary"]["tokens"]
    assert f"| {1e-3 * tokens:,.0f} |\n" in markdown.split("The optimum")[0]


def test_html_needs_nothing_else(folder: Path) -> None:
    report("report.toml", "out")
    html = Path("out/results.html").read_text()
    assert html.count("<svg") == 5
    assert "<table>" in html
    assert "<img" not in html
    assert not re.findall(r'(?:src|href)="(?!#)(?!http://www\.w3\.org)[^"]*\.(?:svg|png|css|js)"', html)


def test_missing_runs_are_counted(folder: Path) -> None:
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join(lines[1:]))
    _, markdown, _ = compose("report.toml")
    gone = json.loads(lines[0])
    place = f"{gone['method']} ({gone['sweep']['size']} at {float(gone['sweep']['flops']):.3g})"
    assert re.search(r"1 of the recipe's \d+ runs were not made, and are not in tables and plots: ", markdown)
    assert f"plots: {place}." in markdown
    text = study_as_comparison(Path("isoflop.toml").read_text())
    Path("compare.toml").write_text(text)
    Path("report.toml").write_text(
        DEFINITION.replace('title = "By label"', 'title = "By label"\nrecipe = "compare.toml"')
    )
    _, markdown, _ = compose("report.toml")
    assert re.search(r"1 of the recipe's 6 runs were not made, .*: dense hidden_size=16 \(seed 0\)\.", markdown)


def study_as_comparison(text: str) -> str:
    """The study's runs at 1e9 FLOPs as a comparison's recipe."""
    shared, methods = text.split("[isoflop]")[0], "[methods" + text.split("[methods", 1)[1]
    return f'{shared}[compare.sweep]\n"model.hidden_size" = [16, 32, 64]\n[budget]\nflops = 1e9\n{methods}'


def test_a_row_that_stands_in_two_files_counts_once(folder: Path) -> None:
    _, once, _ = compose("report.toml")
    Path("more.jsonl").write_text(Path("rows.jsonl").read_text())
    Path("report.toml").write_text(DEFINITION.replace('rows = ["rows.jsonl"]', 'rows = ["rows.jsonl", "more.jsonl"]'))
    _, twice, _ = compose("report.toml")
    assert twice.replace(", `more.jsonl`", "") == once


def test_a_runs_own_figures_stay_apart_from_other_settings_with_its_name(folder: Path) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    rows += [{**row, "key": f"other {row['key']}"} for row in rows]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        UserError, match="section 'By label' of the report has two runs of 'dense flops=1e9 size=small'"
    ):
        compose("report.toml")


def test_the_same_bytes_whatever_the_style_at_hand(folder: Path) -> None:
    report("report.toml", "one")
    style = {"font.size": 17, "axes.prop_cycle": mpl.cycler(color=["k"]), "lines.linewidth": 5, "figure.dpi": 33}
    with mpl.rc_context(style):
        report("report.toml", "two")
        assert mpl.rcParams["font.size"] == 17
    for path in Path("one").rglob("*.*"):
        assert path.read_bytes() == Path("two", *path.parts[1:]).read_bytes(), path


def test_names_are_text_and_never_markup(folder: Path) -> None:
    rows = Path("rows.jsonl").read_text().replace('"dense', '"<b>a|b</b>')
    Path("rows.jsonl").write_text(rows)
    Path("report.toml").write_text(DEFINITION.replace('title = "Small"', 'title = "Small < & </title>"'))
    report("report.toml", "out")
    html = Path("out/results.html").read_text()
    assert "<title>Small &lt; &amp; &lt;/title&gt;</title>" in html
    assert "<b>" not in html
    assert "<td>&lt;b&gt;a|b&lt;/b&gt; flops=1e9 size=small</td>" in html


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('recipe = "isoflop.toml"\n', "", "section 'Curves & sizes' of the report names no recipe: add recipe"),
        (
            'kind = "isoflop"',
            'kind = "seconds"',
            "section 'Curves & sizes' of the report names no speeds: add speeds",
        ),
        ('{ x = ["batch"],', "{", "section 'Seconds' of the report draws a table over nothing: add plot.x"),
        ('x = ["batch"]', 'x = ["kind"]', "section 'Seconds' of the report draws kind, which in a row is 'dense'"),
        ("eval.final_windows", "eval.none", "draws eval.none, which in a row is None: a number"),
        ('kind = "table"', 'kind = "list"', "kind = 'list': expected one of 'isoflop', 'comparison', 'table'"),
        ('title = "Small"', "", "the recipe lacks title"),
        (
            'title = "By label"',
            'title = "Over a Setting!"',
            "two sections of the report are called 'Over a Setting!' and 'Over a setting'",
        ),
        (
            'kind = "table"\nrows = ["cost.jsonl"]',
            'kind = "scaling"\nrows = []',
            "'Seconds' of the report names no rows",
        ),
    ],
)
def test_mistakes_are_named(folder: Path, old: str, new: str, message: str) -> None:
    assert old in DEFINITION
    Path("report.toml").write_text(DEFINITION.replace(old, new))
    with pytest.raises(UserError) as error:
        compose("report.toml")
    assert message in str(error.value)


def test_a_definition_or_folder_that_is_none_is_named(folder: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"none.toml is not a file: name a report's definition"):
        compose("none.toml")
    with pytest.raises(UserError, match=r"file is not a folder: name one to write to"):
        report("report.toml", "file")
    assert Path("file").read_text() == ""


def test_the_command_names_what_it_wrote(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import peerlm_studies.report.report as module

    stub = create_autospec(module.report, return_value=[Path("out/results.md")])
    monkeypatch.setattr(module, "report", stub)
    with pytest.raises(SystemExit) as end:
        main(["report", "report.toml", "--output", "out"])
    assert end.value.code == 0
    stub.assert_called_once_with(Path("report.toml"), Path("out"))
    assert capsys.readouterr().out == "out/results.md\n"


def test_the_projects_results_are_what_its_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, markdown, figures = compose("results/report.toml")
    assert Path("docs/results.md").read_text(encoding="utf-8") == markdown, "run peerlm report results/report.toml"
    assert {path.stem for path in Path("docs/results").glob("*.svg")} == set(figures)


def test_a_report_can_be_made_from_any_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compose("report.toml")[1]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert compose(folder / "report.toml")[1] == here
    (folder / "results").mkdir()
    (folder / "report.toml").rename(folder / "results" / "report.toml")
    text = (folder / "results/report.toml").read_text()
    (folder / "results/report.toml").write_text(f'root = ".."\n{text}')
    assert compose(folder / "results/report.toml")[1] == here
    (folder / "results/report.toml").write_text(f'root = "none"\n{text}')
    with pytest.raises(UserError, match=r"the root of .*report.toml, .*none, is not a folder: correct root"):
        compose(folder / "results/report.toml")


def test_settings_tell_with_what_rows_were_made(folder: Path, study: Any) -> None:
    recipe = Path("isoflop.toml").read_text()
    assert 'folder = "' in recipe
    before = re.search(r'folder = "(.*)"', recipe)
    assert before is not None
    Path("isoflop.toml").write_text(recipe.replace(before[0], 'folder = "elsewhere"'))
    assert "No rows yet: `peerlm isoflop isoflop.toml`" in compose("report.toml")[1]
    setting = f"""settings = ['data.folder="{before[1]}"']\n"""
    Path("report.toml").write_text(f"{setting}{DEFINITION}")
    _, markdown, _ = compose("report.toml")
    assert "No rows yet: `peerlm isoflop isoflop.toml`" not in markdown
    assert f"--output runs/again --set data.folder={before[1]} --set data.sources=[]`" in markdown
    Path("report.toml").write_text(DEFINITION.replace('recipe = "isoflop.toml"', f'recipe = "isoflop.toml"\n{setting}'))
    assert "No rows yet: `peerlm isoflop isoflop.toml`" not in compose("report.toml")[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install the package chromium")
def test_the_page_is_no_wider_than_a_phone(folder: Path, tmp_path: Path) -> None:
    long = "results/" + "a_rather_long_name_of_a_file_of_rows" * 3 + ".jsonl"
    Path("report.toml").write_text(DEFINITION.replace("Of nothing much.", f"See `{long}` and {long}."))
    report("report.toml", "out")
    html = Path("out/results.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    Path("out/measured.html").write_text(html.replace("</body>", f"{script}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", Path("out/measured.html").resolve().as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    measured = re.search(r"<title>(\d+) of (\d+)</title>", page)
    assert measured is not None
    assert int(measured[1]) <= int(measured[2]) <= 500
