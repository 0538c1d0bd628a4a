"""A comparison's recipe becomes its runs; what a row depends on is in its key."""

from dataclasses import replace
from pathlib import Path

import pytest

from peerlm import UserError
from peerlm_studies.comparison.plan import ComparePlan, load_plan

RECIPE = """
run = "out"
[data]
folder = "tokens"
[budget]
steps = 3
[model]
hidden_size = 32
[compare]
seeds = [0, 1]
[methods.dense.model]
ffw_layers = "dense"
[methods.PEER.model]
ffw_layers = "peer"
peer = { num_experts = 16 }
"""


def plan_of(tmp_path: Path, text: str = RECIPE, *overrides: str) -> ComparePlan:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_plan(path, overrides)


def test_every_method_is_trained_with_every_seed_in_its_own_folder(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [(run.method, run.seed) for run in plan.runs] == [("dense", 0), ("PEER", 0), ("dense", 1), ("PEER", 1)]
    assert len({run.train.run for run in plan.runs}) == 4
    assert all(Path(run.train.run).parent == Path("out/runs") for run in plan.runs)
    assert [run.train.seed for run in plan.runs] == [0, 0, 1, 1]


def test_a_method_changes_the_shared_recipe_and_keeps_the_rest(tmp_path: Path) -> None:
    dense, peer = plan_of(tmp_path).runs[:2]
    assert dense.train.model == {"hidden_size": 32, "ffw_layers": "dense"}
    assert peer.train.model == {"hidden_size": 32, "ffw_layers": "peer", "peer": {"num_experts": 16}}
    assert dense.train.budget == peer.train.budget


def test_a_sweep_multiplies_the_runs(tmp_path: Path) -> None:
    text = RECIPE.replace("[methods.dense", '[compare.sweep]\n"optim.learning_rate" = [1e-3, 2e-3]\n[methods.dense')
    plan = plan_of(tmp_path, text, "compare.seeds=[5]")
    assert [(run.label, run.train.optim.learning_rate) for run in plan.runs] == [
        ("dense learning_rate=0.001", 1e-3),
        ("dense learning_rate=0.002", 2e-3),
        ("PEER learning_rate=0.001", 1e-3),
        ("PEER learning_rate=0.002", 2e-3),
    ]
    assert len({run.train.run for run in plan.runs}) == 4


def test_a_method_may_have_fewer_values_of_a_sweep(tmp_path: Path) -> None:
    rates = ["compare.seeds=[5]", "compare.sweep={'optim.learning_rate' = [1e-3, 2e-3]}"]
    plan = plan_of(tmp_path, RECIPE, *rates, "compare.only={PEER = {'optim.learning_rate' = [2e-3]}}")
    labels = [run.label for run in plan.runs]
    assert labels == ["dense learning_rate=0.001", "dense learning_rate=0.002", "PEER learning_rate=0.002"]
    with pytest.raises(UserError, match=r"= \[3.0\]: give a list of some of \[0.001, 0.002\]"):
        plan_of(tmp_path, RECIPE, *rates, "compare.only={PEER = {'optim.learning_rate' = [3.0]}}")


def test_the_key_names_what_the_row_depends_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    key = plan.runs[0].key(plan.compare)
    moved = plan_of(tmp_path, RECIPE, "run=elsewhere", "log.every=5", "data.workers=2")
    assert moved.runs[0].key(moved.compare) == key
    for change in ("budget.steps=4", "model.hidden_size=64", "optim.learning_rate=1", "eval.windows=3"):
        changed = plan_of(tmp_path, RECIPE, change)
        assert changed.runs[0].key(changed.compare) != key, change
    assert plan.runs[0].key(replace(plan.compare, evaluate=("book.txt",))) != key
    assert len({run.key(plan.compare) for run in plan.runs}) == 4


def test_keys_of_rows_that_were_made_before_stay(tmp_path: Path) -> None:
    """A new setting that no weight depends on must not have every study made again."""
    expected = ["6d3c43629020a280", "4dbae52e4ad82879", "4447a3eebc44403f", "d6cb6c6c4dd32f30"]
    for changes in ([], ["checkpoint.minutes=1"], ["checkpoint.every=7", "log.tensorboard=true"]):
        plan = plan_of(tmp_path, RECIPE, *changes)
        assert [run.key(plan.compare) for run in plan.runs] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("compare.seeds=[]", "compare.seeds is empty: name at least one seed"),
        ("compare.sed=[1]", "unknown key 'compare.sed': did you mean 'compare.seeds'"),
        ("compare.only.moe={}", "compare.only names 'moe': choose from dense"),
        ("compare.only.dense.seed=[3]", "compare.only.dense.seed is not swept: choose from"),
        ("compare.sweep.seed=3", "compare.sweep.seed = 3: give a list"),
        ("compare.jobs=0", "compare.jobs = 0: must be at least 1"),
        ('compare.evaluate=["a/test.txt", "b/test.txt"]', "by its name without the ending, and 'test' is taken"),
        ('compare.evaluate=["a/validation.txt"]', "and 'validation' is taken; rename or copy one"),
        ("compare=3", "compare = 3: expected a section"),
        ("methods.dense=3", "methods.dense = 3: expected a section"),
        ("methods.dense.modl=3", "unknown key 'modl'"),
        ("methods.dense.data.context=1", "data.context = 1"),
        ("seed=7", "the recipe has seed = 7, and seeds of a study are compare.seeds: leave seed out, or set"),
        ("methods.dense.seed=7", "set compare.seeds = [7]"),
        ("compare.sweep.seed=[1, 2]", "the recipe has seed = 1"),
        (
            "methods.PEER={model = {ffw_layers = 'dense'}, tables = {folder = 'x'}}",
            "'dense, seed 0' and 'PEER, seed 0' are",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        plan_of(tmp_path, RECIPE, change)
    assert message in str(error.value)


def test_a_recipe_without_methods_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe.toml compares nothing: add a section \[methods.NAME\]"):
        plan_of(tmp_path, RECIPE.split("[methods")[0])
    with pytest.raises(UserError, match="lacks run: add the folder"):
        plan_of(tmp_path, RECIPE.replace('run = "out"', ""))


def test_a_setting_that_came_later_changes_no_old_key(tmp_path: Path) -> None:
    """The key of the first run was written down before eval.copying was there."""
    plain, asked = plan_of(tmp_path), plan_of(tmp_path, RECIPE, "eval.copying=true")
    assert plain.runs[0].key(plain.compare) == "6d3c43629020a280"
    assert asked.runs[0].key(asked.compare) != "6d3c43629020a280"
    off = plan_of(tmp_path, RECIPE, "eval.copying=false")
    assert off.runs[0].key(off.compare) == "6d3c43629020a280"
