"""Rows become a law for each method, and the law says what to train."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm import UserError
from peerlm.accounting import model_cost
from peerlm.cli import main
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.terminal import print_markdown
from peerlm_studies.report.report import compose
from peerlm_studies.scaling import planner
from peerlm_studies.scaling.fit import Law
from peerlm_studies.scaling.law_file import DEFAULT_LAW, read_law
from peerlm_studies.scaling.laws import law_markdown, plot_law, scaling
from peerlm_studies.scaling.planner import Candidate, plan_model, plan_quantities, plan_row
from peerlm_studies.scaling.points import embedding_parameters, experts_of, groups_of, kind_of, point_of
from peerlm_studies.scaling.spend import read_bytes

TRUE = {
    "dense": Law(c=1.5, a=60.0, alpha=0.3, b=500.0, beta=0.35),
    "PEER": Law(c=1.5, a=60.0, alpha=0.3, b=500.0, beta=0.35, epsilon=0.02),
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"ffw_layers": "dense"},
    "PEER": {"ffw_layers": "peer", "peer": {"num_experts": 256, "heads": 2, "experts_per_head": 8, "key_dim": 16}},
}


def row(method: str, width: int, flops: float, experts: int = 256) -> dict[str, Any]:
    """A row whose figures are the accounting's and whose loss is the law's."""
    model = {**MODELS[method], "hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 4}
    if method == "PEER":
        model["peer"] = {**model["peer"], "num_experts": experts}
    with torch.device("meta"):
        cost = model_cost(PeerForCausalLM(PeerConfig(**model, vocab_size=300)), 64)
    tokens = int(flops / cost.training_flops_per_token)
    found: dict[str, Any] = {
        "key": f"{method} {width} {flops} {experts}",
        "method": method,
        "seed": 0,
        "config": {
            "model": model,
            "data": {"folder": "d", "vocab_size": 300, "context": 64, "workers": 0, "micro_batch_size": None},
            "optim": {"learning_rate": 1e-3},
            "precision": "fp32",
        },
        "summary": {
            "active_parameters": cost.active_parameters,
            "tokens": tokens,
            "flops": tokens * cost.training_flops_per_token,
            "validation_loss": 1.0,
        },
    }
    point = point_of(found)
    found["summary"]["validation_loss"] = TRUE[method].loss(
        size=point.size, tokens=point.tokens, granularity=point.granularity, expansion=point.expansion
    )
    return found


@pytest.fixture(scope="module")
def law_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The law of dense models of four widths, and of PEER with three numbers of experts too, at three budgets."""
    folder = tmp_path_factory.mktemp("law")
    budgets, widths = (1e11, 4e11, 1.6e12), (32, 64, 128, 192)
    rows = [row("dense", width, flops) for flops in budgets for width in widths]
    rows += [row("PEER", width, flops, n) for flops in budgets for width in widths[:3] for n in (64, 256, 4096)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    scaling([folder / "rows.jsonl"], folder / "law.json", times=10, starts=6)
    return folder / "law.json"


def test_every_method_has_its_law(law_file: Path) -> None:
    law = read_law(law_file)
    assert list(law["methods"]) == ["dense", "PEER"]
    for name, fit in law["methods"].items():
        assert fit["error"] < 1e-3
        assert fit["held_out"]["worst"] < 0.02
        assert fit["left_out"]["mean"] <= fit["left_out"]["worst"] < 0.02
        assert fit["held_out"]["best_size"] == fit["held_out"]["expected_best_size"]
        assert fit["constants"]["epsilon"] == pytest.approx(TRUE[name].epsilon, abs=2e-3)
        assert fit["varied"] == {"granularity": False, "expansion": name == "PEER"}
    assert law["methods"]["dense"]["runs"] == 12
    assert law["methods"]["dense"]["held_out"]["runs"] == 4
    text = law_markdown(law)
    assert "| dense | 1.5" in text
    assert "gamma" not in text
    for fit in law["methods"].values():
        for name, (low, high) in fit["intervals"].items():
            if value := fit["constants"][name]:
                assert (f"| {value:.3g} ({low:.2g} to {high:.2g}) |" in text) == (high - low <= abs(value))
    assert len(plot_law(law).axes[0].lines) == 3


def test_held_out_runs_are_not_seen_by_the_fit_that_predicts_them(tmp_path: Path) -> None:
    rows = [row("dense", width, flops) for flops in (1e11, 4e11, 1.6e12) for width in (32, 64, 128, 192)]
    for each in rows[-4:]:
        each["summary"]["validation_loss"] *= 1.1
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    law = scaling([tmp_path / "rows.jsonl"], tmp_path / "law.json", times=1, starts=6)
    assert law["methods"]["dense"]["held_out"]["mean"] == pytest.approx(1 - 1 / 1.1, abs=0.01)


def test_runs_beyond_a_budget_can_be_left_out_altogether(tmp_path: Path) -> None:
    rows = [row("dense", width, flops) for flops in (1e11, 4e11, 1.6e12) for width in (32, 64, 128, 192)]
    beyond = json.loads(json.dumps([row("dense", width, 6.4e12) for width in (64, 128)]))
    for each in beyond:
        each["summary"]["validation_loss"] /= 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows + beyond))
    law = scaling([tmp_path / "rows.jsonl"], tmp_path / "law.json", up_to=2e12, times=1, starts=6)
    assert law["methods"]["dense"]["runs"] == 12
    assert law["methods"]["dense"]["error"] < 1e-3
    with pytest.raises(UserError, match=r"^no run in the rows has at most 1e\+10 FLOPs: raise --up-to$"):
        scaling([tmp_path / "rows.jsonl"], tmp_path / "law.json", up_to=1e10)


def test_a_model_left_out_is_not_seen_by_the_fit_that_predicts_it(tmp_path: Path) -> None:
    rows = [row("dense", width, flops) for flops in (1e11, 4e11, 1.6e12) for width in (32, 64, 128, 192)]
    other_seed = json.loads(json.dumps(rows[5]))
    rows.append({**other_seed, "seed": 1})
    for each in (rows[5], rows[-1]):  # both seeds of one model
        each["summary"]["validation_loss"] *= 1.1
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    fit = scaling([tmp_path / "rows.jsonl"], tmp_path / "law.json", times=1, starts=8)["methods"]["dense"]
    assert fit["left_out"]["worst"] == pytest.approx(1 - 1 / 1.1, abs=0.01)
    budgets = (1e11, 4e11, 1.6e12)
    once = [row("PEER", width, flops, n) for flops in budgets for width in (32, 64) for n in (64, 256)]
    once.append(row("PEER", 64, 1e11, 4096))  # without this one there is nothing to tell epsilon from
    (tmp_path / "once.jsonl").write_text("".join(json.dumps(each) + "\n" for each in once))
    law = scaling([tmp_path / "once.jsonl"], tmp_path / "law.json", times=1, starts=6)
    assert law["methods"]["PEER"]["left_out"] is None
    assert "worst of these" in law_markdown(law)


@pytest.mark.parametrize("flops", [4e11, 1.6e12, 6.4e12])
def test_the_plan_is_the_best_there_is(law_file: Path, flops: float) -> None:
    best = {candidate.method: candidate for candidate in plan_model(read_law(law_file), flops=flops)}
    assert set(best) == {"dense", "PEER"}
    for width in (32, 48, 64, 96, 128, 192, 256, 448):
        assert best["dense"].loss < row("dense", width, flops)["summary"]["validation_loss"] * 1.005
    for width, experts in [(64, 64), (64, 1024), (128, 4096)]:
        assert best["PEER"].loss < row("PEER", width, flops, experts)["summary"]["validation_loss"] * 1.005
    for candidate in best.values():
        again = row(candidate.method, candidate.hidden_size, flops, candidate.experts or 256)["summary"]
        if candidate.layers == 4:
            assert candidate.tokens == again["tokens"]
            assert candidate.active_parameters == again["active_parameters"]
            assert candidate.loss == pytest.approx(again["validation_loss"], rel=5e-3)
        assert candidate.low <= candidate.loss * 1.01
        assert candidate.high >= candidate.loss * 0.99
        beyond = any("flops" in warning for warning in candidate.warnings)
        assert beyond == (flops > 2e12)


@pytest.mark.parametrize(
    ("measured", "planned"),
    [
        ("peer", "peer"),
        (["peer", "peer"], "peer"),
        (["dense", "peer", "peer", "dense"], "peer:inner"),
        (["dense", "peer+dense", "peer+dense", "dense"], "peer+dense:inner"),
        (["dense", "peer"], None),
    ],
)
def test_figures_of_deep_models_are_those_of_the_whole_model(law_file: Path, measured: Any, planned: Any) -> None:
    law = read_law(law_file)
    law["methods"]["PEER"]["model"]["ffw_layers"] = measured
    found = next(c for c in plan_model(law, flops=1e17, method="PEER") if c.layers > 4)
    peer = {**MODELS["PEER"]["peer"], "num_experts": found.experts, "heads": found.heads}
    sizes = {"hidden_size": found.hidden_size, "num_hidden_layers": found.layers, "num_attention_heads": 4}
    with torch.device("meta"):
        config = PeerConfig(**sizes, ffw_layers=planned, peer=peer, vocab_size=300, max_position_embeddings=64)
        cost = model_cost(PeerForCausalLM(config), 64)
    assert (cost.total_parameters, cost.active_parameters) == (found.total_parameters, found.active_parameters)
    assert found.tokens == int(1e17 / cost.training_flops_per_token)
    assert (found.row_bytes, found.decoding_bytes) == (cost.row_bytes_per_token, cost.parameter_bytes_per_token)
    assert found.table_gib * 2**30 == cost.table_training_bytes > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"ffw_layers": ["dense", "peer", "peer", "dense"], "ffw_init_scale": [1.0, 2.0, 2.0, 1.0]},
        {"ffw_layers": "peer", "ffw_init_scale": {"peer": 1.0}},
        {"ffw_layers": "peer+swiglu", "ffw_init_scale": {"peer": 1.0, "swiglu": 2.0}, "parallel_intermediate_size": 8},
    ],
)
def test_where_outputs_start_and_what_is_beside_costs_what_the_model_does(settings: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 300}
    settings = {**sizes, **settings, "peer": MODELS["PEER"]["peer"]}
    with torch.device("meta"):
        whole = model_cost(PeerForCausalLM(PeerConfig(**settings)), 64)
    assert planner._cost(settings, 64) == whole


def test_a_plan_stays_within_the_experts_that_were_measured(law_file: Path) -> None:
    """More experts are always better by this law, so that its word alone would take more than any run had."""
    (found,) = plan_model(read_law(law_file), flops=1e16, method="PEER")
    assert found.experts == 4096
    assert not any(name in warning for warning in found.warnings for name in ("experts", "expansion", "granularity"))


def test_memory_limits_the_model(law_file: Path) -> None:
    def best(memory: float) -> Candidate:
        return plan_model(read_law(law_file), flops=1.6e12, memory=memory, method="PEER")[0]

    free, tight = best(math.inf), best(2**24)
    assert free.memory_gib > 2**-6 >= tight.memory_gib
    assert tight.loss > free.loss


def test_bytes_of_rows_limit_the_model(law_file: Path) -> None:
    def best(row_bytes: float) -> Candidate:
        return plan_model(read_law(law_file), flops=1.6e12, row_bytes=row_bytes, method="PEER")[0]

    free = best(math.inf)
    tight = best(free.row_bytes - 1)
    assert free.row_bytes > tight.row_bytes > 0
    assert tight.loss > free.loss
    assert plan_quantities(tight)["rows read per token, bytes"] == f"{tight.row_bytes:.3g}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flops": 0.0}, "--flops 0: must be above 0"),
        ({"flops": math.inf}, "--flops inf: must be above 0 and finite"),
        ({"flops": 1e12, "memory": -1.0}, "--memory -1: must be above 0"),
        ({"flops": 1e12, "row_bytes": 0.0}, "--row-bytes 0: must be above 0"),
        ({"flops": 1e12, "row_bytes": 5.0, "method": "PEER"}, "within 1e\\+12 FLOPs, 5 bytes of rows per token, with"),
        ({"flops": 1e12, "method": "rival"}, "the law has no method 'rival': choose from dense, PEER"),
        (
            {"flops": 1e12, "memory": 1000.0},
            "no model of at least 32 wide trains on one window within 1e\\+12 FLOPs, 9.31e-07 GiB,",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(law_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_model(read_law(law_file), **options)


def test_bytes_have_units() -> None:
    assert [read_bytes(text) for text in ("80GiB", "1.5 MB", "12", "inf")] == [80 * 2**30, 1.5e6, 12, math.inf]
    for text in ("much", "80 gigs", "e"):
        with pytest.raises(UserError, match=f"--memory '{text}': write a number of bytes with a unit"):
            read_bytes(text)
    with pytest.raises(UserError, match="--row-bytes 'much'"):
        read_bytes("much", "--row-bytes")


def test_runs_that_differ_in_other_settings_are_fitted_apart() -> None:
    rows = [row("PEER", 32, 1e11), row("PEER", 32, 1e11, 64), row("PEER", 64, 1e11), row("dense", 32, 1e11)]
    rows += [json.loads(json.dumps(rows[0])), json.loads(json.dumps(rows[0]))]
    rows[-1]["key"] = "another"
    rows[-1]["config"]["optim"]["learning_rate"] = 2e-3
    groups = groups_of(rows)
    assert [(group.name, len(group.rows)) for group in groups] == [("PEER", 3), ("dense", 1), ("PEER (2)", 1)]


def test_size_is_the_same_whether_embeddings_are_tied() -> None:
    model = {**MODELS["dense"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = []
    for tied in (True, False):
        settings = {**model, "tie_word_embeddings": tied}
        cost = model_cost(PeerForCausalLM(PeerConfig(**settings, vocab_size=300)), 64)
        sizes.append(cost.active_parameters - embedding_parameters(settings, 300))
    assert sizes[0] == sizes[1] > 0


def changed(found: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    """The row of another run, with other values in a section of its configuration."""
    config = {**found["config"], section: {**found["config"].get(section, {}), **values}}
    return {**found, "key": f"{found['key']} {section} {values}", "config": config}


@pytest.mark.parametrize("method", ["dense", "PEER"])
def test_a_default_that_a_row_does_not_state_makes_no_other_group(method: str) -> None:
    old = row(method, 32, 1e11)
    later = [
        changed(old, "optim", tables="auto", table_beta1=None, eps=1e-8),
        changed(old, "model", pkm={}, ffw_init_scale=3.0),
    ]
    later.append(changed(old, "model", peer={**old["config"]["model"].get("peer", {}), "pairing": "row-major"}))
    assert [(group.name, len(group.rows)) for group in groups_of([old, *later])] == [(method, 4)]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("eval", {"final_windows": 512}),
        ("grow", {"at": "16@50%"}),
        ("optim", {"eps": 1e-6}),
        ("model", {"ffw_init_scale": 2.0}),
    ],
)
def test_what_makes_losses_incomparable_makes_another_group(section: str, values: dict[str, Any]) -> None:
    old = row("dense", 32, 1e11)
    assert len(groups_of([old, changed(old, section, **values)])) == 2


def test_experts_are_counted_by_the_kind_of_layer() -> None:
    assert experts_of({"ffw_layers": "dense"}) == (1.0, 1.0)
    assert experts_of(MODELS["PEER"]) == (16.0, 16.0)
    assert experts_of({"ffw_layers": ["dense", "pkm"], "pkm": {"num_values": 4096}}) == (128.0, 32.0)
    assert experts_of({"ffw_layers": "expert_choice", "expert_choice": {"num_experts": 16}}) == (1.0, 16.0)
    assert experts_of({}) == (128.0, 8192.0)
    assert kind_of({"ffw_layers": None}) == "peer"
    assert kind_of({"ffw_layers": ["dense", "dense+pkm"]}) == "pkm"
    assert kind_of({"ffw_layers": ["dense", "hashed_ngrams+peer"]}) == "peer"  # whose experts are searched


def test_fits_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=r"there are no rows at .*rows.jsonl: name a file"):
        scaling([rows], tmp_path / "law.json")
    rows.write_text("".join(json.dumps(row("dense", width, 1e11)) + "\n" for width in (32, 64)))
    with pytest.raises(UserError, match="there is no method 'PEER' in the rows: choose from dense"):
        scaling([rows], tmp_path / "law.json", methods=["PEER"])
    with pytest.raises(UserError, match="dense has 2 runs, and a fit needs 8: make more"):
        scaling([rows], tmp_path / "law.json", methods=["dense"])
    with pytest.raises(UserError, match="no method has the 8 runs that a fit needs: make more"):
        scaling([rows], tmp_path / "law.json")
    assert not (tmp_path / "law.json").exists()


def test_files_that_are_no_law_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no law at .*law.json: make one with `peerlm scaling`"):
        read_law(tmp_path / "law.json")
    for content in ("[]", '{"methods": {}}', '{"files": [], "digest": "", "methods": {"dense": {}}}'):
        (tmp_path / "law.json").write_text(content)
        with pytest.raises(UserError, match=r"law.json is no law of `peerlm scaling`"):
            read_law(tmp_path / "law.json")


def test_the_commands_print_tables_and_warnings(law_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--flops", "1e13", "--memory", "8GiB", "--law", str(law_file)])
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert "width" in shown.out
    assert "flops 1e+13 is outside of what was fitted, 1e+11 to 1.6e+12" in " ".join(
        shown.out.replace("│", " ").split()
    )


def test_a_report_says_when_rows_changed_since_the_fit(
    law_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = json.loads(law_file.read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(Path(law["files"][0]).read_bytes())
    monkeypatch.chdir(tmp_path)
    Path("law.json").write_text(json.dumps({**law, "files": ["rows.jsonl"]}))
    section = (
        '[[section]]\ntitle = "Law"\nkind = "scaling"\nrows = ["law.json"]\ncommand = "peerlm scaling rows.jsonl"\n'
    )
    Path("report.toml").write_text(f'title = "T"\n{section}')
    _, fresh, figures = compose("report.toml")
    assert "| dense | 1.5" in fresh
    assert list(figures) == ["law-law"]
    assert "changed" not in fresh
    rows.write_text(rows.read_text() + json.dumps(row("dense", 32, 2e11)) + "\n")
    assert "Rows have changed since this was fitted: `peerlm scaling rows.jsonl`" in compose("report.toml")[1]
    Path("law.json").unlink()
    assert "No rows yet: `peerlm scaling rows.jsonl` makes them." in compose("report.toml")[1]


def test_far_from_the_fit_a_plan_says_so_first_and_gives_ranges(
    law_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = read_law(law_file)
    for flops in (1e21, 1e9):
        found = plan_model(law, flops=flops)
        assert [candidate.method for candidate in found] == ["dense", "PEER"]  # the law's order: no ranking
        for candidate in found:
            row = plan_row(candidate)
            assert set(row) == {"method", "experts", "warnings", "ranges"}
            assert all(low <= high for low, high in row["ranges"].values())
            low, high = row["ranges"]["loss"]
            assert 0.99 * low <= candidate.loss <= 1.01 * high
    with pytest.raises(SystemExit):
        main(["plan", "--flops", "1e21", "--law", str(law_file)])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(
        "Extrapolation: 1e+21 FLOPs is 6.3e+08 times the largest budget that the law was fitted to, 1.6e+12. No run"
    )
    assert "which is best here is not known" in shown
    for candidate in plan_model(law, flops=1e21):
        assert f"{candidate.tokens:,}" not in shown
        assert f"{candidate.loss:.3f}" not in shown


def test_methods_that_were_fitted_to_less_are_named(law_file: Path) -> None:
    law = json.loads(law_file.read_text())
    law["methods"]["dense"]["flops"][1] = 1e11
    assert planner.preface(law, 5e11, None) == ""
    words = planner.preface(law, 1.2e12, None)
    assert words.startswith("Extrapolation of dense: 1.2e+12 FLOPs is 12 times the largest budget")
    assert planner.preface(law, 1.2e12, "PEER") == ""
    below = planner.preface(law, 1e9, None)
    assert below.startswith("Extrapolation: 1e+09 FLOPs is 1e+02 times less than the smallest budget")


def test_near_the_fit_a_plan_has_numbers(law_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = read_law(law_file)
    for flops in (2e11, 1.2e13):
        for candidate in plan_model(law, flops=flops):
            assert candidate.ranges is None
            assert plan_row(candidate)["tokens"] == candidate.tokens
    assert plan_model(law, flops=2e13)[0].ranges is not None
    with pytest.raises(SystemExit):
        main(["plan", "--flops", "2e11", "--law", str(law_file), "--json", "-"])
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads(json.dumps([plan_row(candidate) for candidate in plan_model(law, flops=2e11)]))


def test_draws_that_disagree_make_ranges_wide(law_file: Path) -> None:
    law = json.loads(law_file.read_text())
    fit = law["methods"]["dense"]
    fit["bootstrap"] = [[1.0, 60.0, alpha, 500.0, 0.35, 0, 0, 0] for alpha in (0.1, 0.3, 0.9)]
    wide = plan_model(law, flops=1e18, method="dense")[0].ranges
    fit["bootstrap"] = fit["bootstrap"][:1] * 3
    narrow = plan_model(law, flops=1e18, method="dense")[0].ranges
    assert wide is not None
    assert narrow is not None
    assert wide["hidden_size"][1] > 2 * wide["hidden_size"][0]
    assert narrow["hidden_size"][0] == narrow["hidden_size"][1]


def test_a_backbone_is_built_once_for_all_methods_and_experts(law_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(config: PeerConfig) -> PeerForCausalLM:
        built.append(config)
        return PeerForCausalLM(config)

    monkeypatch.setattr(planner, "PeerForCausalLM", build)
    reports: list[tuple[int, int]] = []
    plan_model(read_law(law_file), flops=4e11, vocab_size=301, report=lambda done, total: reports.append((done, total)))
    assert len(built) == 2 * len(planner.WIDTHS)
    total = reports[0][1]
    assert reports == [(done, total) for done in range(1, total + 1)]
    assert total > 3 * len(planner.WIDTHS)


def test_a_wrong_budget_is_refused_before_anything_large_is_imported() -> None:
    program = (
        "import sys; from peerlm.cli import main\n"
        "try: main(['plan', '--flops', '-1'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False False\n"
    assert done.stderr == "error: --flops -1: must be above 0 and finite\n"


def test_names_with_commas_are_quoted_in_messages(law_file: Path, tmp_path: Path) -> None:
    law = json.loads(law_file.read_text())
    law["methods"] = {"PEER, every block": law["methods"]["PEER"], "dense": law["methods"]["dense"]}
    with pytest.raises(UserError, match="no method 'PEER': choose from 'PEER, every block', 'dense'"):
        plan_model(law, flops=1e12, method="PEER")


def test_the_law_of_the_package_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_markdown(law_markdown(read_law(DEFAULT_LAW)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "PEER, every block" in [line.strip() for line in lines]
    assert not any("…" in line for line in lines)
