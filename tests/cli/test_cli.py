"""The command line: what each command passes on, what it prints, and the exit code of every way to end."""

import errno
import io
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, Mock, create_autospec

import pytest
import torch
import typer
from safetensors import SafetensorError

import peerlm
from peerlm import UserError
from peerlm.cli import main
from peerlm.cli.root import app
from peerlm.errors import PeerlmWarning, TrainingStopped
from peerlm.ranks import ALONE

from .shown import commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Mock:
    import peerlm.data

    split = SimpleNamespace(documents=3, tokens=12_345, bytes=67, shards=(), ends=None)
    stub: Mock = create_autospec(
        peerlm.data.prepare,
        return_value=SimpleNamespace(vocab_size=512, splits={"train": split}, document_start=(), files=None),
    )
    monkeypatch.setattr(peerlm.data, "prepare", stub)
    return stub


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Mock:
    import peerlm.train

    stub: Mock = create_autospec(
        peerlm.train.train,
        return_value=SimpleNamespace(run=Path("runs/a"), summary={"steps": 1000, "train_loss": 1.25}),
    )
    monkeypatch.setattr(peerlm.train, "train", stub)
    monkeypatch.setattr(peerlm.train, "load_recipe", create_autospec(peerlm.train.load_recipe, return_value="config"))
    return stub


def test_prepare_passes_every_option(capsys: pytest.CaptureFixture[str], prepare: Mock) -> None:
    code, out, _ = run(
        capsys,
        *("prepare", "demo", "more.jsonl", "--output", "data", "--tokenizer", "tok", "--vocab-size", "300"),
        *("--holdout", "0.1", "--seed", "7", "--text-field", "body", "--document-start", "<s>", "--workers", "3"),
    )
    assert code == 0
    prepare.assert_called_once_with(
        ["demo", "more.jsonl"],
        Path("data"),
        tokenizer=Path("tok"),
        vocab_size=300,
        holdout=0.1,
        seed=7,
        text_field="body",
        document_start="<s>",
        workers=3,
        progress=True,
    )
    assert "12,345" in out


def test_train_loads_the_recipe_with_its_settings(capsys: pytest.CaptureFixture[str], train: Mock) -> None:
    from peerlm.train import load_recipe

    arguments = ("--set", "seed=1", "--set", "log.every=2", "--output", 'runs/"b"', "--resume")
    code, out, _ = run(capsys, "train", "r.toml", *arguments)
    assert code == 0
    load_recipe.assert_called_once_with(Path("r.toml"), ["seed=1", "log.every=2", r'run="runs/\"b\""'])  # type: ignore[attr-defined]
    train.assert_called_once_with("config", resume=True, progress=True)
    assert "1,000" in out
    assert "1.25" in out


@pytest.mark.parametrize(
    ("given", "resume"), [(["--resume", "r.toml"], True), (["r.toml", "--resume=auto"], "auto"), (["r.toml"], False)]
)
def test_resume_takes_no_argument_and_may_be_automatic(
    capsys: pytest.CaptureFixture[str], train: Mock, given: list[str], resume: object
) -> None:
    assert run(capsys, "train", *given)[0] == 0
    train.assert_called_once_with("config", resume=resume, progress=True)


def test_another_resume_is_refused(capsys: pytest.CaptureFixture[str], train: Mock) -> None:
    assert run(capsys, "train", "r.toml", "--resume=maybe") == (
        2,
        "",
        "error: --resume=maybe is unknown: write --resume, or --resume=auto\n",
    )
    train.assert_not_called()


def test_train_prints_json_alone(capsys: pytest.CaptureFixture[str], train: Mock) -> None:
    code, out, err = run(capsys, "train", "r.toml", "--json=-")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"run": "runs/a", "steps": 1000, "train_loss": 1.25}
    train.assert_called_once_with("config", resume=False, progress=False)


def test_only_the_first_process_of_several_prints(
    capsys: pytest.CaptureFixture[str], train: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train", "r.toml") == (0, "", "")
    train.assert_called_once()


ROWS = {"a.txt": {"tokens": 12_345, "perplexity": 20.123456}, "b.jsonl": {"tokens": 5, "accuracy": 0.25}}


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Mock:
    import peerlm.evaluate

    stub: Mock = create_autospec(peerlm.evaluate.evaluate, return_value=ROWS)
    monkeypatch.setattr(peerlm.evaluate, "evaluate", stub)
    return stub


def test_eval_prints_a_table_of_every_measure(capsys: pytest.CaptureFixture[str], evaluate: Mock) -> None:
    options = ("--context", "64", "--stride", "32", "--limit", "9", "--document-start", "none")
    code, out, _ = run(capsys, "eval", "run", "a.txt", "b.jsonl", *options)
    assert code == 0
    files = [Path("a.txt"), Path("b.jsonl")]
    evaluate.assert_called_once_with(
        Path("run"),
        files,
        context=64,
        stride=32,
        limit=9,
        detokenized=False,
        copying=False,
        document_start="none",
        packs=[],
        device_rows=0,
        progress=True,
    )
    for text in ("a.txt", "12,345", "20.12", "accuracy", "0.25"):
        assert text in out


def test_eval_prints_json_on_request(capsys: pytest.CaptureFixture[str], evaluate: Mock) -> None:
    code, out, _ = run(capsys, "eval", "run", "a.txt", "--json", "-")
    assert code == 0
    assert json.loads(out) == ROWS
    assert evaluate.call_args.kwargs["progress"] is False


def test_eval_writes_json_beside_the_table(capsys: pytest.CaptureFixture[str], evaluate: Mock, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "eval", "run", "a.txt", "--json", str(tmp_path / "rows.json"))
    assert code == 0
    assert "20.12" in out
    assert json.loads((tmp_path / "rows.json").read_text()) == ROWS


def test_eval_prints_notes_beside_the_table_and_leaves_them_in_json(
    capsys: pytest.CaptureFixture[str], evaluate: Mock
) -> None:
    noted = {name: {**row, "notes": ["mind the gap"]} for name, row in ROWS.items()}
    evaluate.return_value = noted
    _, out, err = run(capsys, "eval", "run", "a.txt", "b.jsonl")
    assert (err, "mind the gap" in out) == ("note: mind the gap\n", False)
    _, out, err = run(capsys, "eval", "run", "a.txt", "--json", "-")
    assert (err, json.loads(out)) == ("note: mind the gap\n", noted)


def test_a_warning_of_ours_is_one_line_and_others_are_as_python_prints_them(
    capsys: pytest.CaptureFixture[str], evaluate: Mock
) -> None:
    def warn(*_: object, **__: object) -> dict[str, dict[str, object]]:
        warnings.warn("half of it is lost", PeerlmWarning, stacklevel=2)
        warnings.warn("something else", RuntimeWarning, stacklevel=2)
        return ROWS

    evaluate.side_effect = warn
    with pytest.warns(RuntimeWarning, match="something else") as caught:
        _, _, err = run(capsys, "eval", "run", "a.txt")
    assert err == "warning: half of it is lost\n"
    assert len(caught) == 1


def test_compare_passes_the_recipe_and_its_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import peerlm_studies.comparison.compare as module

    compare = create_autospec(module.compare, return_value=[{"method": "peer"}])
    monkeypatch.setattr(module, "compare", compare)
    code, out, _ = run(capsys, "compare", "r.toml", "--set", "seed=1", "--output", "runs/c", "--json=-")
    assert code == 0
    compare.assert_called_once_with(Path("r.toml"), ["seed=1", 'run="runs/c"'], progress=False, shard=None, ranks=ALONE)
    assert json.loads(out) == [{"method": "peer"}]


def test_generate_asks_for_a_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import peerlm.evaluate as module

    monkeypatch.setattr(module, "load_model", create_autospec(module.load_model, return_value=("model", "tokenizer")))
    sample_text = create_autospec(module.sample_text)
    monkeypatch.setattr(module, "sample_text", sample_text)
    notes = create_autospec(module.notes_on_generation, return_value=["the prompt begins with <s>"])
    monkeypatch.setattr(module, "notes_on_generation", notes)
    options = ("--tokens", "3", "--temperature", "0.5", "--seed", "7", "--top-k", "9", "--top-p", "0.9")
    begins = ("--document-start", "<s>", "--device-rows", "12")
    printed = (0, "", "note: the prompt begins with <s>\n")
    assert run(capsys, "generate", "runs/a", "Once", *options, *begins) == printed
    notes.assert_called_once_with("model", "tokenizer", "<s>", chat=False)
    module.load_model.assert_called_once_with(Path("runs/a"), [], device_rows=12)  # type: ignore[attr-defined]
    sample_text.assert_called_once_with(
        "model",
        "tokenizer",
        "Once",
        tokens=3,
        temperature=0.5,
        top_k=9,
        top_p=0.9,
        seed=7,
        document_start="<s>",
        chat=False,
        streamer=ANY,
    )


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    """A model of random weights and a tokenizer of bytes, saved as a run saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|endoftext|>")
    config = peerlm.PeerConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffw_layers="dense",
    )
    peerlm.PeerForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_generate_prints_the_same_text_again(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "generate", str(saved_model), "Once", "--tokens", "8")
    assert code == 0
    assert out.startswith("Once")
    assert len(out) > len("Once\n")
    assert run(capsys, "generate", str(saved_model), "Once", "--tokens", "8")[1] == out
    assert run(capsys, "generate", str(saved_model), "Once", "--tokens", "8", "--seed", "1")[1] != out


def test_info_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--json=-")
    facts = json.loads(out)
    assert code == 0
    assert facts["peerlm"] == peerlm.__version__
    assert facts["torch"] == torch.__version__
    assert "reference" in facts["backends"]
    on_gpu = torch.cuda.is_available()
    assert facts["device in use"].startswith("cuda" if on_gpu else "cpu")
    assert (facts["steps of training"] == "eager") != on_gpu
    assert facts["updates of tables"].startswith("by ")
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert torch.__version__ in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"peerlm {peerlm.__version__}\n", "")


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "compare", "generate", "info"])
def test_help_gives_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"peerlm {command} " in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian", "r.toml"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "r.toml", "--budget", "3"], "No such option"),
        (["prepare", "demo"], "Missing option '--output'"),
        (["prepare", "demo", "--output", "data", "--vocab-size", "many"], "--vocab-size"),
        (["eval", "run", "a.txt", "--context", "1.5"], "--context"),
        (["generate", "run", "Once", "--tokens", "0"], "--tokens"),
        (["generate", "run", "Once", "--temperature", "-1"], "--temperature"),
    ],
)
def test_wrong_usage_is_told_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert complaint in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("seed = -1: must be 0 or more"), 2, "error: seed = -1: must be 0 or more\n"),
        (UserError("two\n  lines"), 2, "error: two lines\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.toml"), 2, "error: No such file: a.toml\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: the disk is full: free some space, then run this again\n",
        ),
        (OSError("no model in this folder"), 2, "error: no model in this folder\n"),
        (
            TrainingStopped("stopped at step 7", exit_code=143),
            143,
            "stopped at step 7\nResume with: peerlm prepare demo --output data\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_way_to_fail_has_its_sentence_and_exit_code(
    capsys: pytest.CaptureFixture[str], prepare: Mock, error: BaseException, code: int, message: str
) -> None:
    prepare.side_effect = error
    assert run(capsys, "prepare", "demo", "--output", "data") == (code, "", message)


def test_a_bug_keeps_its_traceback(prepare: Mock) -> None:
    prepare.side_effect = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["prepare", "demo", "--output", "data"])


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "runs/a", "caf\udce9"],
        ["eval", "runs/caf\udce9"],
        ["train", "recipe\udce9.toml"],
        ["prepare", "demo", "--output", "\udce9"],
        ["caf\udce9"],
    ],
)
def test_an_argument_that_is_not_utf8_is_one_sentence(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"error: argument {len(words)}, ")
    assert "\\xe9" in err


def test_what_the_terminal_cannot_show_is_escaped(evaluate: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate.return_value = {"caf\xe9.txt": {"name": "\u2603"}}
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "run", "a.txt"])
    assert exit_.value.code == 0
    sys.stdout.flush()
    assert rb"caf\xe9.txt" in written.getvalue()
    assert rb"\u2603" in written.getvalue()


def all_commands() -> list[tuple[str, Any]]:
    return [pair for pair in commands(typer.main.get_command(app)) if not hasattr(pair[1], "commands")]


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_help_fits_the_terminal_and_its_examples_can_be_copied(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, command: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *name.split()[1:], "--help")
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert "<bool>" not in out
    assert "list[" not in out
    examples = [line for line in command.epilog.split("\n\n") if line.startswith("peerlm ")]
    assert examples
    for example in examples:
        assert example in [line.strip() for line in lines]


def test_every_command_writes_json_to_a_file_or_to_stdout() -> None:
    # which print a text, print the files that they wrote, answer over HTTP
    without = {"peerlm generate", "peerlm report", "peerlm serve"}
    for name, command in all_commands():
        options = [parameter for parameter in command.params if "--json" in parameter.opts]
        assert [(option.metavar, option.is_flag) for option in options] == [("FILE", False)] * (name not in without)


def test_json_that_cannot_be_written_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], evaluate: Mock, tmp_path: Path
) -> None:
    code, _, err = run(capsys, "eval", "run", "a.txt", "--json", str(tmp_path / "none" / "rows.json"))
    assert code == 2
    assert "--json" in err
    assert "name a file in a folder that exists" in err
    evaluate.assert_not_called()


def test_a_stopped_command_says_what_to_type(
    capsys: pytest.CaptureFixture[str], train: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peerlm.train, "load_recipe", lambda path, settings: SimpleNamespace(run="my run"))
    train.side_effect = TrainingStopped("stopped by SIGINT after step 7", exit_code=130)
    code, _, err = run(capsys, "train", "r.toml", "--set", "seed=1", "--output", "my run")
    assert code == 130
    assert err.endswith("Resume with: peerlm train 'my run' --resume\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(capsys, "train", "r.toml")[2].endswith(
        "Resume with, started as before: peerlm train 'my run' --resume\n"
    )
    monkeypatch.delenv("WORLD_SIZE")
    train.side_effect = TrainingStopped("the loss is nan", exit_code=3)
    assert run(capsys, "train", "r.toml") == (3, "", "the loss is nan\n")


def test_what_torchrun_starts_several_times_over_is_refused_once(
    capsys: pytest.CaptureFixture[str], prepare: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, "lifelong", "r.toml")
    assert code == 2
    assert err.endswith("start it without torchrun, and give each process a share of its rows, as in --shard 1/4\n")
    said = run(capsys, "learn", "runs/a")[2]
    assert "peerlm learn does not run over the 4 processes" in said
    assert "each with a GPU of its own" in said
    assert "peerlm compare --slurm does not run over" in run(capsys, "compare", "r.toml", "--slurm=shards=2")[2]
    assert "peerlm isoflop --dry-run does not run over" in run(capsys, "isoflop", "r.toml", "--dry-run")[2]
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "prepare", "demo", "--output", "data") == (0, "", "")
    prepare.assert_not_called()


def test_a_full_disk_that_native_code_reports_is_one_sentence(
    capsys: pytest.CaptureFixture[str], prepare: Mock
) -> None:
    prepare.side_effect = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    sentence = "error: the disk is full: free some space, then run this again\n"
    assert run(capsys, "prepare", "demo", "--output", "data") == (2, "", sentence)
    prepare.side_effect = OSError(errno.ENOSPC, "No space left on device", "data/a.bin")
    assert "the disk of data/a.bin is full" in run(capsys, "prepare", "demo", "--output", "data")[2]


def test_what_has_no_shorter_way_is_resumed_by_the_same_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import peerlm.continual.stream as stream

    stopped = create_autospec(stream.learn, side_effect=TrainingStopped("stopped by SIGINT", exit_code=130))
    monkeypatch.setattr(stream, "learn", stopped)
    words = ["learn", "runs/a", "--text", "my text.txt", "--output", "runs/b"]
    err = run(capsys, *words)[2]
    assert err.endswith("Resume with: peerlm learn runs/a --text 'my text.txt' --output runs/b --resume\n")
    assert run(capsys, *words, "--resume")[2] == err
    assert "--output runs/b --resume=auto\n" in run(capsys, *words, "--resume=auto")[2]
