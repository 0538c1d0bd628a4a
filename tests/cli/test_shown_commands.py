"""Commands that help texts, documents and recipes show work as they stand: parsed, planned, and the quick ones run."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from peerlm.cli import main
from peerlm.cli.root import overrides
from peerlm_studies.scaling.law_file import DEFAULT_LAW, read_law

from ..fresh import python
from .shown import DOCUMENTS, OURS, ROOT, Shown, copy, options_of, parse, provide_text, shown_commands

SHOWN = shown_commands()
WHOLE = [shown for shown in SHOWN if shown.is_whole]


def load_train(path: Path, settings: Sequence[str], parameters: dict[str, Any]) -> None:
    from peerlm.train import load_recipe

    load_recipe(path, settings)


def load_comparison(path: Path, settings: Sequence[str], parameters: dict[str, Any]) -> None:
    from peerlm_studies.comparison.plan import load_plan

    load_plan(path, settings)


def load_study(path: Path, settings: Sequence[str], parameters: dict[str, Any]) -> None:
    from peerlm_studies.isoflop.plan import load_isoflop

    plan = load_isoflop(path, settings)
    assert plan.runs(methods=parameters["method"], budgets=parameters["budget"], sizes=parameters["size"])


def load_stream(path: Path, settings: Sequence[str], parameters: dict[str, Any]) -> None:
    from peerlm_studies.lifelong.plan import load_plan

    load_plan(path, settings)


def load_timed(path: Path, settings: Sequence[str], parameters: dict[str, Any]) -> None:
    from peerlm_studies.equal_seconds.plan import load_seconds

    load_seconds(path, settings)


LOADERS: dict[str, Callable[[Path, Sequence[str], dict[str, Any]], None]] = {
    "train": load_train,
    "compare": load_comparison,
    "isoflop": load_study,
    "lifelong": load_stream,
    "seconds": load_timed,
}


def test_commands_are_found_in_every_place() -> None:
    places = {shown.where for shown in SHOWN}
    assert {"peerlm train --help", "README.md", "docs/train.md", "copa.yaml"} <= places
    assert len(WHOLE) > 60


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.line)
def test_options_and_arguments_are_those_of_the_command(shown: Shown) -> None:
    if not shown.is_whole:
        assert options_of(shown.words) == set()
        return
    name, parameters = parse(shown.words)
    for value in parameters.values():
        for path in value if isinstance(value, list) else [value]:
            if str(path).startswith(OURS) and not str(path).startswith("docs") and path != parameters.get("output"):
                assert (ROOT / path).exists(), path
    if "recipe" in parameters and str(parameters["recipe"]).startswith("recipes/"):
        settings = overrides(parameters["settings"], parameters["output"])
        LOADERS[name](ROOT / parameters["recipe"], settings, parameters)


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["peerlm", "eval", "runs/a", "--detokenise"])
    with pytest.raises(Exception, match="Missing"):
        parse(["peerlm", "grow", "runs/a", "--num-experts", "64"])
    with pytest.raises(Exception, match="No such command"):
        parse(["peerlm", "evaluate", "runs/a"])
    with pytest.raises(Exception, match="unknown key"):
        load_train(ROOT / "recipes/demo.toml", [], {})
    assert options_of(["peerlm", "scaling", "--down-to"]) == {"--down-to"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_and_scripts_that_a_document_runs_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (peerlm[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, module
    for script in re.findall(r"python (benchmarks/\S+?\.py)", text):
        assert (ROOT / script).is_file(), script


NOT_RUN = {
    r"^peerlm (compare|lifelong) ": "trains many models; tests/studies runs small ones",
    r"^peerlm isoflop (?!.*--dry-run)": "trains many models; tests/studies runs a small study",
    r"^peerlm seconds ": "measures speeds and trains many models; tests/studies/equal_seconds runs small ones",
    r"^peerlm neurons ": "learns an index for minutes; tests/studies/neurons runs it",
    r"^peerlm convert .*--init neurons": "learns an index for a minute; tests/convert/test_convert_neurons.py runs it",
    r"^peerlm scaling ": "fits for minutes; tests/studies/scaling fits a small law",
    r"^peerlm prepare demo": "reads all of the embedded corpus, which takes half a minute",
    r"^peerlm eval .*--tasks": "lm-eval is an extra and needs data; tests/evaluate/test_harness.py runs tasks",
    r"^peerlm report ": "makes every plot; tests/studies/report makes the same report",
    r"^peerlm serve ": "serves until it is told to stop; tests/serve/http starts one",
    r"^peerlm prepare hf:": "needs the network",
    r"^peerlm open-shards ": "needs files of other tools; tests/data/test_open_shards.py writes and opens them",
}
"""Commands that the next test does not run, and why."""


def reason(shown: Shown) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, shown.line)), None)


RUN = [shown for shown in WHOLE if reason(shown) is None]
SLOW = re.compile(r"^peerlm (inspect|isoflop|plan) ")
"""Of the commands that are run, those that take more than five seconds."""


def run_parameter(shown: Shown) -> Any:
    marks = [pytest.mark.slow] if SLOW.search(shown.line) else []
    return pytest.param(shown, id=shown.line, marks=marks)


def test_most_kinds_of_commands_are_run() -> None:
    run = {parse(shown.words)[0] for shown in RUN}
    assert run >= {"train", "eval", "generate", "prepare", "convert", "grow", "shrink", "learn", "inspect", "plan"}
    assert run >= {"info", "pack inspect"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder, tiny runs of PEER and of dense layers, a converted GPT-2 and packs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from peerlm.data import load_tokenizer

    folder = tmp_path_factory.mktemp("world")
    provide_text(folder / "book.txt")
    run(["prepare", f"{folder}/book.txt", "--output", f"{folder}/data", "--vocab-size", "300", "--json", "/dev/null"])
    for name, settings in {"peer": TINY, "dense": {**TINY, "model.ffw_layers": "dense"}}.items():
        changes = [f"--set={key}={value}" for key, value in settings.items()]
        changes += [f"--set=data.folder={folder}/data", "--set=data.sources=[]"]
        output = ["--output", f"{folder}/{name}", "--json", "/dev/null"]
        run(["train", f"{ROOT}/recipes/train-demo.toml", *changes, *output])
        shutil.rmtree(folder / name / "checkpoints")  # nothing shown reads them, and each test copies a run
    tokenizer = load_tokenizer(folder / "data")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=256, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    small = ["--set=num_experts=16", "--set=heads=1", "--set=experts_per_head=2", "--set=key_dim=4"]
    run(["convert", f"{folder}/gpt2", f"{folder}/gpt2-peer", *small])
    texts = [word for name in ("law", "code") for word in ("--text", f"{name}={folder}/book.txt")]
    run(["learn", f"{folder}/peer", *texts, *LEARN, "--output", f"{folder}/learned"])
    texts = ["--text", f"docs={folder}/book.txt", "--background", f"{folder}/book.txt", "--context", "32"]
    run(["learn", f"{folder}/gpt2", *texts, *LEARN, "--output", f"{folder}/learned-beside"])
    return folder


TINY: dict[str, Any] = {
    "model.hidden_size": 32,
    "data.context": 32,
    "data.batch_size": 2,
    "eval.final_windows": 2,
    "budget.steps": 4,
    "model.peer.key_dim": 8,
}
LEARN = ["--method", "pack", "--set=experts=16", "--steps", "1", "--batch-size", "2"]


def run(words: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code in (0, None)


MODELS = {
    "gpt2": "gpt2",
    "my-model": "gpt2",
    "SmolLM2-135M-Instruct": "gpt2",
    "gpt2-peer": "gpt2-peer",
    "dense": "dense",
}
"""Names of folders that are no run of PEER in what is shown."""
TEXTS = ("files", "text", "background", "sources", "prompt_file")


def provide(parameters: dict[str, Any], world: Path) -> None:
    """What a command reads, in the working directory."""
    for name in ("run", "model"):
        if isinstance(path := parameters.get(name), Path) and not path.exists():
            path = path.parent if path.name == "model" else path
            copy(world / MODELS.get(path.name, "peer"), path)
    for path in parameters.get("rows") or []:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "results/frontier.jsonl", path)
    if (recipe := parameters.get("recipe")) is not None and recipe.parent.name == "recipes" and not recipe.exists():
        recipe.parent.mkdir(parents=True)  # as `peerlm compare` leaves one for each of its runs
        config = json.loads((world / "dense/config.json").read_text())
        recipe.write_text(json.dumps({**config, "run": f"runs/{recipe.stem}"}))
    elif recipe is not None and str(recipe).startswith("runs/"):
        copy(world / "peer", recipe.parent if recipe.suffix else recipe)
    elif recipe is not None and not recipe.suffix:
        copy(world / "data", recipe)
    elif recipe is not None and not recipe.exists():
        shutil.copy(ROOT / "recipes/train-demo.toml", recipe)
    for name in TEXTS:
        for text in [parameters.get(name)] if isinstance(parameters.get(name), Path) else parameters.get(name) or []:
            provide_text(Path(str(text).rpartition("=")[2]))
    for pack in [*parameters.get("pack", []), *([parameters["folder"]] if "folder" in parameters else [])]:
        name = "law" if pack.name == "pack" else pack.name  # as a stage of `peerlm learn` calls it
        model = parameters.get("run") or parameters.get("model")
        beside = isinstance(model, Path) and MODELS.get(model.name) == "gpt2"
        copy(next(world.glob("learned-beside/stages/*/pack" if beside else f"learned/stages/*-{name}/pack")), pack)
    if (law := parameters.get("law")) is not None:
        law.parent.mkdir(parents=True, exist_ok=True)
        whole = read_law(DEFAULT_LAW)
        law.write_text(json.dumps({**whole, "methods": {name: whole["methods"][name] for name in ("dense", "PEER")}}))


@pytest.mark.filterwarnings("default")  # others' packages warn of their own affairs
@pytest.mark.parametrize("shown", [run_parameter(shown) for shown in RUN])
def test_a_shown_command_runs(
    shown: Shown, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder with what the command reads; trainings are cut to a few steps of a tiny model.

    What it prints fits a terminal of 80 columns, but for the text of a model.
    """
    import peerlm.continual.stream
    import peerlm.data.sources
    import peerlm.train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peerlm.data.sources, "_demo_corpus", lambda: world / "book.txt")
    monkeypatch.setenv("COLUMNS", "80")
    for folder in OURS:
        if folder != "docs/":  # which is a reader's own in what is shown
            Path(folder.rstrip("/")).symlink_to(ROOT / folder)
    train, load = peerlm.train.train, peerlm.train.load_recipe
    changes = [f"{key}={value}" for key, value in TINY.items()]
    changes += [f"data.folder={world}/data", "data.sources=[]"]

    def load_tiny(path: Path, settings: Sequence[str]) -> Any:
        whole = load(path, settings)  # as shown
        kept = [setting for setting in settings if not setting.startswith("budget.")]
        return whole if path.name == "config.json" else load(path, [*kept, *changes])

    monkeypatch.setattr(peerlm.train, "load_recipe", load_tiny)
    monkeypatch.setattr(peerlm.train, "train", lambda config, **options: train(config, **options))
    monkeypatch.setattr(peerlm.continual.stream, "DEFAULT_BUDGET", peerlm.train.BudgetConfig(steps=1))
    name, parameters = parse(shown.words)
    provide(parameters, world)
    if "--resume" in shown.words and name == "learn":
        run([word for word in shown.words[1:] if word != "--resume"])
    capsys.readouterr()
    run(shown.words[1:])
    out = capsys.readouterr().out
    if name != "generate" and "-" not in shown.words:
        assert "…" not in out
        assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    "words", [["generate", "peer", "One", "--tokens", "1"], ["shrink", "peer", "out", "--text", "book.txt"]]
)
def test_a_command_needs_nothing_that_another_one_imported(world: Path, tmp_path: Path, words: list[str]) -> None:
    """Tests share a process, where whatever registers models with transformers has been imported."""
    there = [str(world / word) if (world / word).exists() else word for word in words]
    module = "import runpy; runpy.run_module('peerlm', run_name='__main__', alter_sys=True)"
    done = python(module, tmp_path, *there)
    assert done.returncode == 0, done.stderr


def test_each_reason_not_to_run_is_needed() -> None:
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, shown.line) for shown in WHOLE)]
    assert unused in ([], [r"^peerlm prepare hf:"])
