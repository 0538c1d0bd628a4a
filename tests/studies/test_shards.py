"""Studies over many machines: shares are all rows, and files of rows are read together."""

import json
from pathlib import Path
from typing import Any

import pytest

from peerlm import UserError
from peerlm.cli import main
from peerlm_studies.comparison.compare import compare
from peerlm_studies.isoflop.study import isoflop
from peerlm_studies.lifelong import study as streams
from peerlm_studies.rows import append_row, read_rows
from peerlm_studies.shards import Shard, read_study, rows_file


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_shares_together_are_all_items_and_one_key_is_in_one_share(count: int) -> None:
    items = [f"{letter}{number}" for number in range(3) for letter in "abcdefghij"]
    shares = [Shard(number, count).share(items, lambda item: item[0]) for number in range(1, count + 1)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    keys = [{item[0] for item in share} for share in shares]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 10
    assert max(map(len, keys)) - min(map(len, keys)) <= 1
    assert all(share == sorted(share, key=items.index) for share in shares)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/8", "--shard 0/8: shares of 8 are numbered 1 to 8"),
        ("9/8", "--shard 9/8: shares of 8 are numbered 1 to 8"),
        ("2", "--shard '2': write the number of the share and how many there are, as in 2/8"),
        ("-1/8", "--shard '-1/8': write the number"),
        ("a/b", "--shard 'a/b': write the number"),
        ("1/0", "--shard 1/0: shares of 0"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "isoflop", "lifelong"])
def test_wrong_shards_are_one_sentence(
    command: str, text: str, message: str, capsys: pytest.CaptureFixture[str], study: Any
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, str(study.path), "--shard", text])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_has_no_shard(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["isoflop", str(study.path), "--dry-run", "--shard", "1/2"])
    assert end.value.code == 2
    assert "--shard cannot be combined with --dry-run" in capsys.readouterr().err


def test_files_of_shards_are_read_after_the_study_s_own(tmp_path: Path) -> None:
    append_row(rows_file(tmp_path), {"key": "a", "from": 0})
    append_row(rows_file(tmp_path, Shard(2, 8)), {"key": "b", "from": 2})
    append_row(rows_file(tmp_path, Shard(1, 8)), {"key": "a", "from": 1})
    append_row(rows_file(tmp_path, Shard(1, 8)), {"key": "c", "from": 1})
    append_row(tmp_path / "rows.old.jsonl", {"key": "d", "from": 9})
    assert [(row["key"], row["from"]) for row in read_study(tmp_path)] == [("a", 0), ("c", 1), ("b", 2)]
    (tmp_path / "rows.1-of-8.jsonl").write_text("no row\n\n")
    with pytest.raises(UserError, match=r"rows.1-of-8.jsonl, line 1"):
        read_study(tmp_path)


def test_shards_of_curves_make_each_run_once_and_merge(
    study: Any, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output: Path = study.plan.output
    for number in (1, 2, 3):
        isoflop(study.path, shard=Shard(number, 3))
    shown = " ".join(capsys.readouterr().out.split())
    for lacking in (8, 4, 6):  # of 12, then of 8 at the optima, since the third shard found all 12
        assert f"{lacking} rows of other shards are not in {output} yet" in shown
    of_all = [f"{run.planned.label} {run.planned.seed}" for run in study.plan.runs()]
    assert sorted(made[:12]) == sorted(of_all)
    assert len(made[12:]) == 2
    assert not (output / "isoflop.json").exists()
    table = isoflop(study.path, progress=False)
    assert len(made) == len(set(made)) == 12 + 8
    assert [row["seeds"] for row in table] == [[0, 1, 2]] * 4
    assert len(read_rows(rows_file(output))) == 6
    made.clear()
    assert isoflop(study.path, progress=False, shard=Shard(2, 3)) == table
    assert made == []


def test_the_last_shard_of_a_comparison_writes_the_table(study: Any, made: list[str], tmp_path: Path) -> None:
    text = study.path.read_text()
    start, end = text.index("[isoflop]"), text.index("[methods.dense")
    path = tmp_path / "compare.toml"
    shared = text[:start].replace("[model]", "[model]\nhidden_size = 16")
    path.write_text(f'{shared}sample = ""\n[budget]\nflops = 4e9\n{text[end:]}')
    part = compare(path, progress=False, shard=Shard(1, 2))
    output: Path = study.plan.output
    assert [row["label"] for row in part] == ["dense"]
    assert not (output / "table.json").exists()
    table = compare(path, progress=False, shard=Shard(2, 2))
    assert [row["label"] for row in table] == ["dense", "PEER"]
    assert json.loads((output / "table.json").read_text()) == table
    assert [path.name for path in sorted(output.glob("rows*"))] == ["rows.1-of-2.jsonl", "rows.2-of-2.jsonl"]
    assert made == ["dense 0", "PEER 0"]


def test_shards_of_streams_share_nothing_but_the_folder_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .lifelong.test_study import RECIPE

    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    bases, runs = [], []

    def run(config: Any, **options: Any) -> list[dict[str, Any]]:
        runs.append(config.run)
        assert config.model == bases[-1].run
        Path(config.run).mkdir(parents=True)
        figures = {"trained_parameters": 1, "flops": 1.0, "seconds": 1.0}
        loss = {"background": 1.0, "b": 1.0, "c": 1.0}
        return [
            {"stage": stage, "loss": loss, "perplexity": loss, **figures}
            for stage in (None, *(each.name for each in config.stages))
        ]

    monkeypatch.setattr(streams, "train_base", lambda config, progress: bases.append(config))
    monkeypatch.setattr(streams, "run_stream", run)
    output = tmp_path / "out"
    result = streams.lifelong(path, progress=False, shard=Shard(1, 2))
    assert [row["label"] for row in result["methods"]] == ["full"]
    assert not (output / "table.json").exists()
    folders = {str(base.run) for base in bases}
    assert folders == {str(output / "shards/1-of-2/base/seed=0")}
    assert {base.data.folder for base in bases} == {str(output / "shards/1-of-2/data/base")}
    result = streams.lifelong(path, progress=False, shard=Shard(2, 2))
    assert [row["label"] for row in result["methods"]] == ["full", "grow"]
    assert json.loads((output / "table.json").read_text()) == {"methods": result["methods"]}
    assert len(runs) == len(set(runs)) == 3
    runs.clear()
    assert streams.lifelong(path, progress=False) == result
    assert runs == []
    assert len(read_study(output)) == 9
