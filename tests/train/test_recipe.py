"""Recipes: what they say, what overrides change, and every way to get one wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerlm.errors import UserError
from peerlm.train import TrainConfig, load_recipe
from peerlm.train.recipe import first_difference, from_dict, to_dict

TOML = """
run = "runs/a"
[data]
folder = "tokens"
sources = ["demo"]
[model]
hidden_size = 32
[model.peer]
num_experts = 64
[optim]
learning_rate = 1
[budget]
steps = 10
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(TOML)
    return tmp_path / "recipe.toml"


def test_a_recipe_is_read_and_the_rest_is_default(path: Path) -> None:
    config = load_recipe(path)
    assert (config.run, config.data.folder, config.data.sources) == ("runs/a", "tokens", ("demo",))
    assert config.model == {"hidden_size": 32, "peer": {"num_experts": 64}}
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.learning_rate, float)
    assert (config.optim.schedule, config.checkpoint.keep, config.seed) == ("cosine", 2, 0)


def test_overrides_apply_in_order_and_reach_every_depth(path: Path) -> None:
    changes = [
        "seed=3",
        "seed=4",
        "optim.schedule=wsd",
        "model.peer.heads=2",
        "model.pkm.heads=1",
        'run="b c"',
    ]
    config = load_recipe(path, [*changes, "data.micro_batch_size=2", "model.ffw_layers=['dense', 'peer']"])
    assert (config.seed, config.optim.schedule, config.run) == (4, "wsd", "b c")
    assert config.data.micro_batch_size == 2
    peer, pkm = {"num_experts": 64, "heads": 2}, {"heads": 1}
    assert config.model == {"hidden_size": 32, "peer": peer, "pkm": pkm, "ffw_layers": ["dense", "peer"]}
    assert load_recipe(path, ["eval.windows=null"]).eval.windows is None


def test_a_budget_on_the_command_line_replaces_the_recipes(path: Path) -> None:
    budget = load_recipe(path, ["budget.flops=2e13"]).budget
    assert (budget.steps, budget.flops) == (None, 2e13)


def test_a_resolved_configuration_reads_back_the_same(path: Path) -> None:
    config = load_recipe(path, ["optim.clip=inf"])
    resolved = path.with_name("config.json")
    resolved.write_text(json.dumps(to_dict(config)))
    assert load_recipe(resolved) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lerning_rate=1", "unknown key 'optim.lerning_rate': did you mean 'optim.learning_rate'?"),
        ("learning_rate=1", "unknown key 'learning_rate': did you mean 'optim.learning_rate'?"),
        ("optm.clip=1", "unknown key 'optm': did you mean 'optim'?"),
        ("budget.step=1", "unknown key 'budget.step': did you mean 'budget.steps'?"),
        ("seed=0.5", "seed = 0.5: expected an integer"),
        ("seed=true", "seed = True: expected an integer"),
        ("log.tensorboard=1", "log.tensorboard = 1: expected true or false"),
        ("optim.clip=true", "optim.clip = True: expected a number"),
        ("optim.clip=much", "optim.clip = 'much': expected a number"),
        ("run=3", "run = 3: expected a string"),
        ("data=3", "data = 3: expected a section of keys"),
        ("model=3", "model = 3: expected a section of keys"),
        ("data.sources=demo", "data.sources = 'demo': expected a list, each part a string"),
        ("data.sources=[1]", "data.sources[0] = 1: expected a string"),
        ("optim.schedule=linear", "optim.schedule = 'linear': expected one of 'cosine', 'wsd'"),
        ("data.micro_batch_size=1.5", "data.micro_batch_size = 1.5: expected an integer"),
        ("seed=null", "seed = None: expected an integer"),
        ("seed", "cannot read the setting 'seed': write it as section.key=value"),
        ("optim..clip=1", "cannot read the setting 'optim..clip=1': write it as section.key=value"),
        ("run.folder=a", "cannot set run.folder: run is 'runs/a', not a section"),
        ("run=", "run = '': name the folder"),
        ("seed=-1", "seed = -1: must be 0 or more"),
        ("seed=18446744073709551616", "seed = 18446744073709551616: must be 0 or more and below 2**64"),
        ("data.folder=''", "data.folder = '': name the folder"),
        ("data.context=1", "data.context = 1: must be at least 2"),
        ("data.batch_size=0", "data.batch_size = 0: must be at least 1"),
        ("data.micro_batch_size=0", "data.micro_batch_size = 0: must be at least 1"),
        ("data.workers=-1", "data.workers = -1: must be 0 or more"),
        ("data.holdout=1.0", "data.holdout = 1.0: must lie between 0 and 1"),
        ("optim.learning_rate=0", "optim.learning_rate = 0.0: must be above 0"),
        ("optim.learning_rate=nan", "optim.learning_rate = nan: must be above 0"),
        ("optim.learning_rate=inf", "optim.learning_rate = inf: must be above 0 and finite"),
        ("optim.table_clip=-1", "optim.table_clip = -1.0: must be above 0"),
        ("optim.final=1.5", "optim.final = 1.5: must lie from 0 to 1"),
        ("optim.beta2=1", "optim.beta2 = 1.0: must be 0 or more, below 1"),
        ("optim.weight_decay=-1", "optim.weight_decay = -1.0: must be 0 or more"),
        ("budget.steps=0", "budget.steps = 0: must be above 0"),
        ("budget.minutes=inf", "budget.minutes = inf: must be above 0 and finite"),
        ("eval.every=-1", "eval.every = -1: must be 0 or more"),
        ("eval.windows=0", "eval.windows = 0: must be at least 1"),
        ("checkpoint.every=-1", "checkpoint.every = -1: must be 0 or more"),
        ("checkpoint.minutes=-1", "checkpoint.minutes = -1.0: must be 0 or more"),
        ("checkpoint.minutes=nan", "checkpoint.minutes = nan: must be 0 or more"),
        ("checkpoint.keep=0", "checkpoint.keep = 0: must be at least 1"),
        ("log.every=0", "log.every = 0: must be at least 1"),
    ],
)
def test_a_mistake_is_named_with_its_mend(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(path, [override])
    assert message in str(error.value)


def test_warmup_and_decay_must_fit_together(path: Path) -> None:
    with pytest.raises(UserError, match=r"optim.warmup \+ optim.decay = 1.2: must be at most 1"):
        load_recipe(path, ["optim.schedule=wsd", "optim.warmup=0.5", "optim.decay=0.7"])


def test_budgets_do_not_add_up(path: Path) -> None:
    with pytest.raises(UserError, match="budget sets steps, tokens of steps, tokens, flops, minutes: set exactly one"):
        load_recipe(path, ["budget.steps=5", "budget.tokens=7"])
    with pytest.raises(UserError, match="budget sets none of steps"):
        load_recipe(path, ["budget.steps=null"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "absent.toml",
            None,
            "cannot read the recipe .*absent.toml: No such file or directory; name a TOML file",
        ),
        ("broken.toml", b"run = ", "broken.toml is not valid TOML: Invalid value"),
        ("broken.json", b"{", "broken.json is not valid JSON: .*line 1"),
        ("list.json", b"[]", "list.json holds a list, not the sections of a recipe"),
        ("binary.toml", b"\xff\xfe\x00", "cannot read the recipe .*binary.toml: it is not UTF-8 text"),
        ("empty.toml", b"", "the recipe lacks run: add it, or give it with --set run=..."),
        ("half.toml", b"run = 'a'\nbudget.steps = 1\n[data]", "the recipe lacks data.folder: add it"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / name)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run and no prepared folder"):
        load_recipe(tmp_path)


def test_differences_that_weights_depend_on_are_found(
    recipe: dict[str, Any], configure: Callable[..., TrainConfig]
) -> None:
    config = from_dict(TrainConfig, recipe)
    free = configure(
        run="elsewhere",
        eval={"every": 1},
        checkpoint={"keep": 9},
        log={"tensorboard": True},
        data={"workers": 1},
    )
    assert first_difference(config, free) is None
    assert first_difference(config, configure(seed=1)) == "seed was 0, now 1"
    assert first_difference(config, configure(data={"context": 8})) == "data.context was 16, now 8"
    assert first_difference(config, configure(model={"pkm": {"heads": 2}})) == "model.pkm.heads was unset, now 2"


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/train-*.toml")), ids=lambda path: path.name
)
def test_the_recipes_of_the_repository_are_valid(path: Path) -> None:
    from peerlm.model import PeerConfig

    PeerConfig(**load_recipe(path).model)


def test_the_folder_of_a_run_stands_for_its_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run and no prepared folder: name one of these, or a recipe"):
        load_recipe(tmp_path)
    config = load_recipe(next(Path(__file__).parents[2].glob("recipes/train-*.toml")))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert load_recipe(tmp_path) == config
    assert load_recipe(tmp_path, ["seed=3"]).seed == 3
