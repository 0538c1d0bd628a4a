"""The report on retrieved neurons, for real and tiny: rows, plot, finetuning, and going on where it was stopped."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peerlm_studies.neurons.finetune as finetuning
import peerlm_studies.neurons.measure as neurons_module
from peerlm import UserError
from peerlm.cli import main
from peerlm.convert import convert
from peerlm.convert.ffws import find_ffws
from peerlm.convert.neurons.layer import neuron_layer
from peerlm.convert.neurons.weights import neurons_of
from peerlm.data import TokenShards, TokenWindows, prepare
from peerlm.data.tokenizer import load_tokenizer
from peerlm.errors import TrainingStopped
from peerlm.evaluate import held_out_loss
from peerlm.layers import DenseFFW
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.testing import float64
from peerlm_studies.neurons.finetune import finetune_neurons
from peerlm_studies.neurons.measure import WholeLayer, measure_neurons, smallest_shares
from peerlm_studies.neurons.setup import draw_windows, layer_inputs, load_setup, replaced
from peerlm_studies.rows import read_rows

from ...models import PEER_SETTINGS, build

pytestmark = pytest.mark.usefixtures("float64")

CONTEXT = 16
SETTINGS = {"heads": 2, "key_dim": 8}
OPTIONS: dict[str, Any] = {
    "settings": SETTINGS,
    "fit_tokens": 640,
    "fit_steps": 20,
    "windows": 6,
    "progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file, its tokens, and a model in float64 with two dense layers whose outputs matter."""
    folder = tmp_path_factory.mktemp("neurons")
    documents = [
        f"Document {number} tells of {number * number} ships and {number % 7} seas." * 4 for number in range(80)
    ]
    (folder / "books.txt").write_text("\n<|endoftext|>\n".join(documents))
    prepare([folder / "books.txt"], folder / "tokens", vocab_size=300, holdout=0.2, progress=False)
    torch.manual_seed(0)
    kinds = {"dense": "dense", "peer": "peer"}
    for name, kind in kinds.items():
        config = PeerConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            ffw_layers=kind,
            peer={"num_experts": 16, "heads": 1, "experts_per_head": 2, "key_dim": 4},
            ffw_init_scale=10,
        )
        with float64():
            model = PeerForCausalLM(config)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(4)
        model.save_pretrained(folder / name)
        load_tokenizer(folder / "tokens").save_pretrained(folder / name)
    return folder


def measure(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return measure_neurons(
        folder / "dense", output, **({"data": folder / "tokens", "shares": (0.1, 1.0)} | OPTIONS | changes)
    )


def test_report_has_rows_of_all_retrievals_and_is_exact_with_all_neurons(folder: Path, tmp_path: Path) -> None:
    report = measure(folder, tmp_path)
    rows = {(row["retrieval"], row["share"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 6
    setup = load_setup(folder / "dense", data=folder / "tokens", settings={})
    windows = TokenWindows(TokenShards(folder / "tokens", "heldout"), CONTEXT)
    dense = math.exp(held_out_loss(setup.model, windows, batch_size=8, limit=6))
    assert report["dense_perplexity"] == pytest.approx(dense)
    for (retrieval, share), row in rows.items():
        assert sorted(row["errors"]) == ["model.layers.0.ffw", "model.layers.1.ffw"]
        if share == 1:
            assert row["perplexity"] == pytest.approx(dense)
            assert max(row["errors"].values()) < 1e-7
        else:
            assert row["neurons_per_token"] == [6, 6]
            assert row["perplexity"] != pytest.approx(dense)
        assert (row["flops_per_token"] is None) == (retrieval == "oracle")
    few = {retrieval: sum(rows[retrieval, 0.1]["errors"].values()) for retrieval in ("oracle", "learned", "random")}
    assert few["oracle"] < few["learned"] < few["random"]
    assert rows["learned", 0.1]["flops_per_token"] < rows["learned", 1.0]["flops_per_token"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "neurons.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_not_measured_again_and_missing_ones_come_out_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = measure(folder, tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:-1]) + lines[-1][:20])
    again = measure(folder, tmp_path)
    for row in report["rows"]:
        (same,) = [other for other in again["rows"] if other["key"] == row["key"]]
        assert same == row
    monkeypatch.setattr(neurons_module, "_measure", None)
    assert measure(folder, tmp_path) == again
    with pytest.raises(TypeError):
        measure(folder, tmp_path, seed=1)


def test_text_files_serve_as_well_and_their_last_fifth_is_held_out(folder: Path, tmp_path: Path) -> None:
    setup = load_setup(folder / "dense", text=[folder / "books.txt"], settings={})
    total = len(setup.train) + len(setup.heldout)
    assert len(setup.heldout) == total // 5
    report = measure(folder, tmp_path, data=None, text=[folder / "books.txt"], shares=(1.0,))
    dense = math.exp(held_out_loss(setup.model, setup.heldout, batch_size=8, limit=6))
    assert report["dense_perplexity"] == pytest.approx(dense)


def test_windows_are_drawn_without_repetition_in_an_epoch() -> None:
    windows = list(torch.arange(14).view(7, 2))
    drawn = torch.cat([draw_windows(windows, 3, seed=1), draw_windows(windows, 11, seed=1, start=3)])
    assert sorted(drawn[:7].tolist()) == sorted(drawn[7:].tolist()) == [window.tolist() for window in windows]
    assert drawn[:7].tolist() != drawn[7:].tolist()


def test_inputs_are_what_the_layers_read(folder: Path) -> None:
    setup = load_setup(folder / "dense", data=folder / "tokens", settings={})
    setup.model.double()
    ids = draw_windows(setup.train, 10, seed=0)
    inputs = layer_inputs(setup, ids)
    with torch.no_grad():
        hidden = setup.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        block = setup.model.model.layers[0]
        outputs = block.ffw(inputs["model.layers.0.ffw"]).view_as(hidden)
        embedded = setup.model.model.embed_tokens(ids)
    before = hidden - outputs  # the residual stream after attention
    torch.testing.assert_close(block.post_attention_layernorm(before).flatten(0, 1), inputs["model.layers.0.ffw"])
    assert not torch.allclose(before, embedded)
    assert not any(module._forward_pre_hooks for module in setup.model.modules())


def test_layers_are_replaced_for_a_while_also_when_something_fails(folder: Path) -> None:
    setup = load_setup(folder / "dense", data=folder / "tokens", settings={})
    model, other = setup.model, nn.Tanh()
    before = model.model.layers[1].ffw
    with replaced(setup, {"model.layers.1.ffw": other}):
        assert model.model.layers[1].ffw.peer is other
    assert model.model.layers[1].ffw is before
    with contextlib.suppress(RuntimeError), replaced(setup, {"model.layers.1.ffw": other}):
        raise RuntimeError("stop")
    assert model.model.layers[1].ffw is before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_models_of_transformers_are_measured_by_the_same_command(name: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name, vocab_size=300, max_position_embeddings=64).double()
    with torch.no_grad():
        for ffw in find_ffws(model):
            ffw.up.module.weight.mul_(20)  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(folder / "tokens").save_pretrained(tmp_path / "model")
    report = measure_neurons(
        tmp_path / "model",
        tmp_path / "out",
        data=folder / "tokens",
        shares=(0.2, 1.0),
        sketch=4,
        context=CONTEXT,
        **OPTIONS,
    )
    rows = {(row["retrieval"], row["share"]): row for row in report["rows"]}
    retrievals = dict.fromkeys(retrieval for retrieval, _ in rows)
    assert list(retrievals) == ["learned", *(["reads"] if name in ("llama", "gemma2") else []), "oracle", "random"]
    few = {retrieval: sum(rows[retrieval, 0.2]["errors"].values()) for retrieval in retrievals}
    assert few["oracle"] < few["learned"] < few["random"]
    if "reads" in few:
        assert few["oracle"] < few["reads"] < few["learned"]
    for retrieval in few:
        assert rows[retrieval, 1.0]["perplexity"] == pytest.approx(report["dense_perplexity"], rel=1e-9)
        assert rows[retrieval, 0.2]["perplexity"] != pytest.approx(report["dense_perplexity"], rel=1e-5)


def test_what_is_asked_for_is_measured_alone_and_its_rows_are_those_of_the_whole_report(
    folder: Path, tmp_path: Path
) -> None:
    some = measure(folder, tmp_path / "some", retrievals=("oracle", "linear"), shares=(0.1, 0.5), fit_steps=2)
    assert [(row["retrieval"], row["share"]) for row in some["rows"]] == [
        (retrieval, share) for retrieval in ("oracle", "linear") for share in (0.1, 0.5)
    ]
    assert list(some["smallest_shares"]) == ["oracle", "linear"]
    by_point = {(row["retrieval"], row["share"]): row for row in some["rows"]}
    assert by_point["linear", 0.1]["flops_per_token"] is None
    whole = measure(folder, tmp_path / "whole", shares=(0.1,), fit_steps=2)
    for row in whole["rows"]:
        if row["retrieval"] == "oracle":
            assert row == by_point["oracle", 0.1]
        if row["retrieval"] == "random":  # linear predictors know something
            assert sum(by_point["linear", 0.1]["errors"].values()) < sum(row["errors"].values())


@pytest.mark.parametrize("settings", [SETTINGS, {"index": "reads", "sketch": 4}], ids=["keys", "reads"])
def test_a_layer_computed_whole_is_the_layer_of_retrieved_neurons(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dense_layer = DenseFFW(16, hidden=40, activation="silu", gated=True).double()
    layer = neuron_layer(neurons_of(dense_layer), {**settings, "share": 0.3})
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    layer.center(x.flatten(0, 1))
    with torch.no_grad():
        torch.testing.assert_close(WholeLayer(layer)(x), layer(x))
        dense = layer.neurons()(x.flatten(0, 1))
    # What the layer leaves out of these inputs has the mean that was measured.
    torch.testing.assert_close(layer(x).flatten(0, 1).mean(0), dense.mean(0))


def test_smallest_share_is_interpolated_in_the_logarithm() -> None:
    ratios = {0.1: 1.5, 0.2: 1.21, 0.5: 1.1, 1.0: 1.0}
    rows = [
        {"retrieval": "learned", "share": share, "perplexity": 50 * ratio, "dense_perplexity": 50}
        for share, ratio in ratios.items()
    ]
    smallest = smallest_shares(rows, "learned")
    assert smallest["10%"] == pytest.approx(0.5)
    assert smallest["3%"] == pytest.approx(1.0 - 0.5 * math.log(1.03) / math.log(1.1))
    assert smallest["1%"] == pytest.approx(1.0 - 0.5 * math.log(1.01) / math.log(1.1))
    assert smallest_shares(rows[:2], "learned") == {"1%": None, "3%": None, "10%": None}
    assert smallest_shares(rows[3:], "learned") == {"1%": 1.0, "3%": 1.0, "10%": 1.0}


def finetune(folder: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    options = {"share": 0.2, "flops": (0.0, 3e8), "data": folder / "tokens", "learning_rates": (3e-3,)}
    return finetune_neurons(folder / "dense", output, **(options | OPTIONS | changes))


def test_finetuning_lowers_every_start_and_its_rows_resume(folder: Path, tmp_path: Path) -> None:
    rows = finetune(folder, tmp_path)
    by_point = {(row["start"], row["flops"]): row for row in rows}
    assert list(by_point) == [(start, flops) for start in ("neurons", "random", "dense") for flops in (0.0, 3e8)]
    dense = measure(folder, tmp_path, shares=(0.2,))
    learned = next(row for row in dense["rows"] if row["retrieval"] == "learned")
    assert by_point["dense", 0.0]["perplexity"] == pytest.approx(dense["dense_perplexity"])
    assert by_point["neurons", 0.0]["perplexity"] == pytest.approx(learned["perplexity"], rel=1e-2)
    for start in ("neurons", "random", "dense"):
        row = by_point[start, 3e8]
        assert row["perplexity"] < by_point[start, 0.0]["perplexity"]
        assert row["train_tokens"] == row["train_steps"] * 8 * CONTEXT
        spent = row["train_tokens"] * row["training_flops_per_token"]
        assert 3e8 - 8 * CONTEXT * row["training_flops_per_token"] < spent <= 3e8
    assert by_point["random", 0.0]["perplexity"] != by_point["neurons", 0.0]["perplexity"]
    path = tmp_path / "finetune.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    again = finetune(folder, tmp_path)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert len(read_rows(path)) == 6


def test_a_loss_that_is_not_finite_stops_finetuning(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"finetuning stopped at step .* take a lower rate") as stopped:
        finetune(folder, tmp_path, starts=("dense",), flops=(3e8,), learning_rates=(1e30,))
    assert stopped.value.exit_code == 3


@pytest.mark.slow
def test_command_measures_finetunes_and_prints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["neurons", f"{folder}/dense", "--data", f"{folder}/tokens", "--output", f"{tmp_path}/out", "--heads=2"]
    command += ["--key-dim=8", "--fit-tokens=640", "--fit-steps=2", "--windows=2"]
    for more, expected in (
        ([], ["learned 2%", "oracle 100%", "smallest share"]),
        (["--finetune=0.5", "--flops=0"], ["neurons, 0 FLOPs", "dense, 0 FLOPs"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert not stop.value.code
        output = capsys.readouterr().out
        assert all(phrase in output for phrase in expected), output
    for more, keys in (([], {"dense_perplexity", "smallest_shares", "rows"}), (["--finetune=0.5", "--flops=0"], None)):
        with pytest.raises(SystemExit):
            main([*command, *more, "--json=-"])
        result = json.loads(capsys.readouterr().out)
        assert set(result) == keys if keys else len(result) == 3


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no text": (lambda f: [f"{f}/dense"], "exactly one of --text and --data"),
    "text and data": (
        lambda f: [f"{f}/dense", f"--text={f}/books.txt", f"--data={f}/tokens"],
        "exactly one of --text and --data",
    ),
    "no model": (lambda f: [f"{f}/none", f"--data={f}/tokens"], "none is not a folder"),
    "no dense layers": (lambda f: [f"{f}/peer", f"--data={f}/tokens"], "has no dense feed-forward layer"),
    "setting impossible": (lambda f: [f"{f}/dense", f"--data={f}/tokens", "--key-dim=5"], "key_dim is 5"),
    "converted": (lambda f: [f"{f}/converted", f"--data={f}/tokens", "--context=16"], "name the model that it was"),
    "context too long": (lambda f: [f"{f}/dense", f"--data={f}/tokens", "--context=17"], "reads at most 16"),
    "share of nothing": (lambda f: [f"{f}/dense", f"--data={f}/tokens", "--share=0"], "share is 0.0"),
    "share impossible": (lambda f: [f"{f}/dense", f"--data={f}/tokens", "--finetune=2"], "share is 2.0"),
    "retrieval unknown": (
        lambda f: [f"{f}/dense", f"--data={f}/tokens", "--retrieval=best"],
        "no way to retrieve 'best'; choose from learned, reads, linear, oracle, random",
    ),
    "reads without gates": (
        lambda f: [f"{f}/dense", f"--data={f}/tokens", "--retrieval=reads"],
        "have no gates; 'reads' takes gated neurons",
    ),
    "share of finetuning": (
        lambda f: [f"{f}/dense", f"--data={f}/tokens", "--finetune=0.5", "--share=0.5"],
        "leave them out with --finetune",
    ),
    "sketch of finetuning": (
        lambda f: [f"{f}/dense", f"--data={f}/tokens", "--finetune=0.5", "--sketch=0"],
        "leave them out with --finetune",
    ),
    "budget without finetuning": (
        lambda f: [f"{f}/dense", f"--data={f}/tokens", "--flops=0"],
        "name --finetune SHARE, or leave them out",
    ),
    "text missing": (lambda f: [f"{f}/dense", f"--text={f}/none.txt"], "none.txt"),
    "text short": (lambda f: [f"{f}/dense", f"--text={f}/short.txt"], "windows of 16 tokens, less than 5"),
    "text of passages": (lambda f: [f"{f}/dense", f"--text={f}/passages.jsonl"], "holds passages"),
    "tokens of another vocabulary": (lambda f: [f"{f}/dense", f"--data={f}/other"], "the model knows 300"),
    "weights not finite": (lambda f: [f"{f}/broken", f"--data={f}/tokens"], "writes NaN; restore the model's weights"),
    "budget of less than a step": (
        lambda f: [f"{f}/dense", f"--data={f}/tokens", "--finetune=0.5", "--flops=5", "--fit-steps=1"],
        "5 FLOPs are less than one step",
    ),
}


@pytest.fixture(scope="module")
def mistakes(folder: Path) -> Path:
    (folder / "short.txt").write_text("A short text.")
    (folder / "passages.jsonl").write_text('{"context": "Once upon a", "continuation": "time"}\n')
    prepare([folder / "books.txt"], folder / "other", vocab_size=310, holdout=0.2, progress=False)
    model = PeerForCausalLM.from_pretrained(folder / "dense")
    with torch.no_grad():
        model.model.layers[0].ffw.down_proj.weight[0, 0] = math.nan
    model.save_pretrained(folder / "broken")
    load_tokenizer(folder / "tokens").save_pretrained(folder / "broken")
    converted = convert(build("llama", vocab_size=300), layers=0, **PEER_SETTINGS)
    converted.save_pretrained(folder / "converted")
    load_tokenizer(folder / "tokens").save_pretrained(folder / "converted")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    name: str, mistakes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build, named = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        main(["neurons", *build(mistakes), f"--output={tmp_path}/out"])
    stderr = capfd.readouterr().err
    assert stop.value.code == 2, stderr
    assert stderr.splitlines()[-1].startswith("error: ")
    assert named in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_unknown_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no start 'peer'; choose from neurons, random, dense"):
        finetune(folder, tmp_path, starts=("peer",))


@pytest.mark.parametrize("starts", [("neurons",), ("random",), ("dense",)])
def test_a_budget_of_less_than_a_step_is_known_before_an_index_is_learned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(finetuning, "fitted_layers", lambda *arguments, **options: pytest.fail("learns indices"))
    with pytest.raises(UserError, match=r"5 FLOPs are less than one step, which takes .*: raise the budget"):
        finetune(folder, tmp_path, starts=starts, flops=(0.0, 5.0))
    assert not (tmp_path / "finetune.jsonl").exists()


def test_example_of_the_document_runs() -> None:
    document = (Path(__file__).parents[3] / "docs" / "neurons.md").read_text(encoding="utf-8")
    example = "\n".join(re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL))
    exec(compile(example, "docs/neurons.md", "exec"), {})
