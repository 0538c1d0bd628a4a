"""The command line: what each command passes on, what it prints, and the exit code of every way to end."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY, Mock, create_autospec

import pytest
import torch

import peerlm
from peerlm import UserError
from peerlm.cli import main
from peerlm.errors import TrainingStopped


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
        peerlm.data.prepare, return_value=SimpleNamespace(vocab_size=512, splits={"train": split}, files=None)
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
        *("--holdout", "0.1", "--seed", "7", "--text-field", "body"),
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


def test_train_prints_json_alone(capsys: pytest.CaptureFixture[str], train: Mock) -> None:
    code, out, err = run(capsys, "train", "r.toml", "--json")
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
    code, out, _ = run(capsys, "eval", "run", "a.txt", "b.jsonl", "--context", "64", "--stride", "32", "--limit", "9")
    assert code == 0
    files = [Path("a.txt"), Path("b.jsonl")]
    evaluate.assert_called_once_with(
        Path("run"), files, context=64, stride=32, limit=9, detokenized=False, packs=[], progress=True
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


def test_compare_passes_the_recipe_and_its_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import peerlm_studies.comparison.compare as module

    compare = create_autospec(module.compare, return_value=[{"method": "peer"}])
    monkeypatch.setattr(module, "compare", compare)
    code, out, _ = run(capsys, "compare", "r.toml", "--set", "seed=1", "--output", "runs/c", "--json")
    assert code == 0
    compare.assert_called_once_with(Path("r.toml"), ["seed=1", 'run="runs/c"'], progress=False)
    assert json.loads(out) == [{"method": "peer"}]


def test_generate_asks_for_a_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import peerlm.evaluate as module

    monkeypatch.setattr(module, "load_model", create_autospec(module.load_model, return_value=("model", "tokenizer")))
    sample_text = create_autospec(module.sample_text)
    monkeypatch.setattr(module, "sample_text", sample_text)
    options = ("--tokens", "3", "--temperature", "0", "--seed", "7")
    assert run(capsys, "generate", "runs/a", "Once", *options) == (0, "", "")
    module.load_model.assert_called_once_with(Path("runs/a"), [])  # type: ignore[attr-defined]
    sample_text.assert_called_once_with("model", "tokenizer", "Once", tokens=3, temperature=0.0, seed=7, streamer=ANY)


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
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["peerlm"] == peerlm.__version__
    assert facts["torch"] == torch.__version__
    assert "reference" in facts["backends"]
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
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
        (OSError("no model in this folder"), 2, "error: no model in this folder\n"),
        (TrainingStopped("stopped at step 7", exit_code=143), 143, "stopped at step 7\n"),
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
