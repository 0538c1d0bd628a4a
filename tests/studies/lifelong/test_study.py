"""`peerlm lifelong` on texts that take seconds: rows, resuming, figures by hand, mistakes in recipes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerlm.errors import UserError
from peerlm_studies.lifelong import study as experiment
from peerlm_studies.lifelong.plan import load_plan
from peerlm_studies.lifelong.study import markdown_lifelong, summarise
from peerlm_studies.rows import read_rows

# What a domain is measured on is its text: the figures do not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.* is measured on are in the text of:peerlm.errors.PeerlmWarning")

RECIPE = """
run = "{folder}/out"
data = {{ folder = "-", vocab_size = 300, context = 16, batch_size = 4, holdout = 0.1 }}
budget = {{ steps = 3 }}
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
ffw_layers = "peer"
peer = {{ num_experts = 64, heads = 2, experts_per_head = 2, key_dim = 8, pairing = "shells" }}
[lifelong]
base = "a"
orders = [["b", "c"], ["c", "b"]]
[lifelong.domains]
a = {{ text = ["{folder}/a.txt"], heldout = "{folder}/a.txt" }}
b = {{ text = ["{folder}/b.txt"], heldout = "{folder}/b.txt" }}
c = {{ text = ["{folder}/c.txt"], heldout = "{folder}/c.txt" }}
[learn]
budget = {{ steps = 2 }}
batch_size = 4
heldout_windows = 4
[methods.full]
method = "full"
[methods.grow]
method = "grow"
settings = {{ sub_keys = 2 }}
memory = {{ kl = 1.0 }}
once = true
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name in "abc":
        words = [f"{name}{chr(97 + number)}" for number in range(12)]
        documents = [" ".join(random.choice(words, size=40)) for _ in range(20)]
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def test_every_stage_is_a_row_and_an_interrupted_stream_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, made = experiment.learn, []

    def counting(config: Any, **options: Any) -> Any:
        made.append(config.run)
        if len(made) == 2:
            learn(config, **options)
            raise KeyboardInterrupt
        return learn(config, **options)

    monkeypatch.setattr(experiment, "learn", counting)
    with pytest.raises(KeyboardInterrupt):
        experiment.lifelong(recipe, progress=False)
    output = recipe.parent / "out"
    assert len(read_rows(output / "rows.jsonl")) == 3
    result = experiment.lifelong(recipe, progress=False)
    rows = read_rows(output / "rows.jsonl")
    assert len(made) == 4  # three streams, of which one was resumed
    assert [(row["label"], row["order"], row["stage"]) for row in rows[3:6]] == [
        ("grow", ["b", "c"], None),
        ("grow", ["b", "c"], "b"),
        ("grow", ["b", "c"], "c"),
    ]
    assert len({row["key"] for row in rows}) == len(rows) == 9
    assert json.loads((output / "table.json").read_text()) == {"methods": result["methods"]}
    assert (output / "forgetting.png").stat().st_size > 1000
    assert not list((output / "streams").iterdir())
    experiment.lifelong(recipe, progress=False)
    assert len(made) == 4


def test_keys_of_rows_that_were_made_before_stay(tmp_path: Path) -> None:
    """A new setting that no weight depends on must not have every study made again."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder="texts"))
    expected = [
        ["8610b045f70d2510", "e4f703c7bc5cf6bb", "503ca304c09c7998"],
        ["05634e6af5d97863", "c51c89e7de743922", "d12e16d01d8b0d0a"],
        ["ff7fba152853cbf0", "c332095475e45022", "5cdad52fe7da915f"],
    ]
    for changes in ([], ["checkpoint.minutes=1"], ["learn.checkpoint_minutes=1", "learn.checkpoint_every=7"]):
        streams = load_plan(path, changes).streams
        assert [[stream.key(number) for number in range(3)] for stream in streams] == expected


def row(label: str, stage: str | None, losses: tuple[float, float, float], **changes: Any) -> dict[str, Any]:
    loss = dict(zip(("background", "b", "c"), losses, strict=True))
    return {
        "label": label,
        "order": ["b", "c"],
        "seed": 0,
        "stage": stage,
        "loss": loss,
        "perplexity": loss,
        "trained_parameters": 5,
        "flops": 10.0,
        "seconds": 2.0,
        **changes,
    }


def test_figures_by_hand() -> None:
    rows = [
        row("full", None, (1.0, 4.0, 4.0)),
        row("full", "b", (1.5, 2.0, 4.0)),
        row("full", "c", (2.0, 2.5, 3.0)),
        row("kept", None, (1.0, 4.0, 4.0)),
        row("kept", "b", (1.0, 2.2, 4.0)),
        row("kept", "c", (1.1, 2.3, 3.3)),
        row("begun", None, (1.0, 4.0, 4.0)),
    ]
    full, kept = summarise(rows, "full")
    assert full["forgetting"] == pytest.approx(1.0)
    assert full["old_forgetting"] == pytest.approx(0.5)
    assert full["new_loss"] == pytest.approx(2.5)
    assert full["share"] == 1
    assert kept["share"] == pytest.approx(0.1)
    assert kept["excess"] == pytest.approx(0.1)
    assert kept["flops"] == 20
    table = markdown_lifelong([full, kept], rows, "prose")
    assert "| kept | 1 | +0.100 | 10% | +0.100 | 2.750 | +10.0% | 5 | 2.00e+01 | 4 |" in table
    assert "| full | b c, 0 | c | 2.0 | 2.5 | 3.0 |" in table


def test_nothing_forgotten_has_no_share(recipe: Path) -> None:
    rows = [row(label, stage, (1.0, 2.0, 3.0)) for label in ("full", "kept") for stage in (None, "b", "c")]
    full, kept = summarise(rows, "full")
    assert (full["share"], kept["share"]) == (None, None)
    assert kept["excess"] == 0


def test_two_methods_of_one_configuration_both_have_their_rows(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + '[methods.again]\nmethod = "full"\n')
    plan = load_plan(recipe)
    plan.output.mkdir(parents=True)
    made = [stream for stream in plan.streams if stream.label == "full"]
    content = [
        {**row("full", stage, (1.5, 2.0, 3.0)), "key": stream.key(number), "order": stream.order}
        for stream in made
        for number, stage in enumerate([None, *stream.order])
    ]
    (plan.output / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in content))
    found = experiment.summarise(experiment._rows_of(plan), "full")
    assert [(each["label"], each["streams"]) for each in found] == [("full", 2), ("again", 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lifelong.base=z", "there is no domain 'z': add a section"),
        ('lifelong.orders=[["a"]]', r"lifelong.orders has \['a'\]: give each domain but the base's, a, once"),
        ("lifelong.orders=[]", "need at least one entry"),
        ("lifelong.full=none", "there is no method 'none'"),
        ("methods.grow.method=magic", "learn.method = 'magic'"),
        ("methods.grow.speed=3", "unknown key 'methods.grow.speed'"),
        ("lifelong.domains.a.heldout=3", "lifelong.domains.a.heldout = 3"),
        ("methods=3", "methods = 3: expected a section of keys"),
        ("learn.memory.kl=-1", "memory.kl = -1"),
        ("methods.grow.settings.sub_key=1", "unknown key 'grow.sub_key'"),
        ('facts.methods=["none"]', "there is no method 'none'"),
        ("run=3", "lacks run"),
        ("methods={}", "the recipe compares nothing"),
    ],
)
def test_recipes_with_mistakes(change: str, message: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_plan(recipe, [change])


def test_the_recipe_that_is_shipped_is_right() -> None:
    path = Path(__file__).parents[3] / "recipes" / "lifelong.toml"
    plan = load_plan(path)
    assert {stream.seed for stream in plan.streams} == {0, 1}
    assert len({stream.order for stream in plan.streams}) == 2
    assert plan.streams[0].label == "full"
