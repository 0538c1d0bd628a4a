"""From a saved model and a text to the page, its figures, and the command line."""

import json
import math

import pytest
import torch

from peerlm import UserError
from peerlm.cli import main
from peerlm.evaluate import load_model
from peerlm.evaluate.encoding import encode
from peerlm.interpret import Edit, change_of_edits, edit, inspect
from peerlm.interpret.collection import LayerRecord
from peerlm.interpret.inspected import find_inspected_layers
from peerlm.interpret.summary import half_use, layer_figures, sub_key_grid, use_curve
from peerlm.interpret.windows import read_windows, window_nats

from .test_page import data_of

pytestmark = pytest.mark.usefixtures("float64")


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *map(str, arguments)])
    return (stop.value.code or 0, *capsys.readouterr())


def loss_of(model, tokens, context):
    parts = [
        window_nats(logits, tokens[positions]) for positions, logits in read_windows(model, tokens, context=context)
    ]
    return torch.cat([part.flatten() for part in parts]).nanmean().item()


def test_page_and_figures_agree(saved, text, tmp_path):
    page = tmp_path / "page.html"
    figures = inspect(saved, text, output=page, context=16, shown=24, edits=4, progress=False)
    json.dumps(figures, allow_nan=False)
    model, tokenizer = load_model(saved)
    tokens = encode(tokenizer, [text.read_text(encoding="utf-8")]).tokens
    assert figures["tokens"] == len(tokens)
    assert figures["loss"] == pytest.approx(loss_of(model, tokens, 16))
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    for layer in figures["layers"]:
        assert layer["dead"] == pytest.approx(64 * (1 - layer["usage"]))  # softmax: every retrieval has weight
        assert layer["retrievals"] == len(tokens) * 8
        assert len(layer["experts"]) == 10
        importance = [expert["importance"] for expert in layer["experts"]]
        assert importance == sorted(importance, reverse=True)
        assert all(expert["contexts"] and len(expert["up"]) == 6 for expert in layer["experts"])
    assert len(figures["edits"]) == 8
    shown = tokens[:24]
    for row in figures["edits"]:
        with edit(model, row["layer"], row["expert"], row["factor"]):
            changed = loss_of(model, shown, 16)
        assert row["change"] == pytest.approx(changed - loss_of(model, shown, 16))
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["shown"] == 24
    assert [layer["number"] for layer in data["layers"]] == [1, 2]
    assert "<script>document.title" not in page.read_text(encoding="utf-8")


def test_the_page_is_not_written_half(saved, text, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("before")
    monkeypatch.setattr("peerlm.interpret.run.render", lambda title, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inspect(saved, text, output=page, limit=20, edits=0, overwrite=True, progress=False)
    assert page.read_text() == "before"
    assert list(tmp_path.iterdir()) == [page]


def test_more_layers_than_edits_and_few_experts(saved, text, tmp_path):
    page = tmp_path / "page.html"
    figures = inspect(saved, text, output=page, context=16, limit=30, shown=1, edits=1, experts=1, progress=False)
    assert [row["layer"] for row in figures["edits"]] == [1, 1]
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["shown_loss"] is None
    assert inspect(saved, text, context=16, limit=30, edits=0, progress=False)["edits"] == []


def test_what_is_named_is_what_wrote_most_even_of_few_listed_ones(saved, text, monkeypatch):
    monkeypatch.setattr("peerlm.interpret.page_data._MOST_USED", 1)
    options = {"context": 16, "shown": 1, "edits": 0, "progress": False}
    everything = inspect(saved, text, **options)["layers"][0]["experts"]
    few = inspect(saved, text, experts=2, **options)["layers"][0]["experts"]
    assert few[:2] == everything[:2]


def test_a_broken_model_is_one_sentence(tmp_path, tokenizer, text, new_model):
    model = new_model(vocab_size=len(tokenizer))
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"model has a loss of nan on .*text\.txt; name a model"):
        inspect(tmp_path / "model", text, output=tmp_path / "page.html", context=16, progress=False)
    assert not (tmp_path / "page.html").exists()


def test_changes_of_edits_are_those_of_the_edited_model(saved, text):
    model, tokenizer = load_model(saved)
    tokens = encode(tokenizer, [text.read_text(encoding="utf-8")], limit=50).tokens
    figures = inspect(saved, text, limit=50, context=16, edits=0, progress=False)
    first, second = (layer["experts"][0]["expert"] for layer in figures["layers"])
    change = change_of_edits(
        saved, text, [Edit(1, first, 0.0), Edit(2, second, 2.0)], limit=50, context=16, progress=False
    )
    json.dumps(change, allow_nan=False)
    before = loss_of(model, tokens[: figures["tokens"]], 16)
    with edit(model, 1, first, 0.0), edit(model, 2, second, 2.0):
        after = loss_of(model, tokens[: figures["tokens"]], 16)
    assert change["loss"] == pytest.approx(before)
    assert change["edited_loss"] == pytest.approx(after)
    assert change["change"] == pytest.approx(after - before)
    assert len(change["places"]) == 4
    divergence = [place["divergence"] for place in change["places"]]
    assert divergence == sorted(divergence, reverse=True)
    with pytest.raises(UserError, match="there are no edits"):
        change_of_edits(saved, text, [], progress=False)
    with pytest.raises(UserError, match="limit is 1; it must be at least 2"):
        change_of_edits(saved, text, [Edit(1, 0, 0.0)], limit=1, progress=False)


def test_command_writes_the_page_and_json_beside_it(saved, text, tmp_path, capsys):
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    options = ("--context", 16, "--limit", 40, "--shown", 16, "--edits", 2, "--experts", 20)
    code, out, _ = command(capsys, saved, "--text", text, "--output", page, "--json", figures, *options)
    assert code == 0
    assert "layer 1" in out
    assert json.loads(figures.read_text())["tokens"] == 40
    assert page.stat().st_size > 10_000
    before = page.read_bytes()
    code, _, err = command(capsys, saved, "--text", text, "--output", page, *options)
    assert (code, page.read_bytes()) == (2, before)
    assert err == f"error: {page} exists already: name another file with --output, or replace it with --overwrite\n"
    options = (*options, "--overwrite")
    code, out, _ = command(capsys, saved, "--text", text, "--output", page, "--json", "-", *options)
    assert json.loads(out) == json.loads(figures.read_text())


def test_command_prints_what_edits_change(saved, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--context", 16, "--limit", 40, "--knock-out", "1:3", "--boost", "2:5=2")
    code, out, _ = command(capsys, saved, "--text", text, *options)
    assert code == 0
    assert "edited loss" in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = command(capsys, saved, "--text", text, *options, "--json", "-")
    assert [item["factor"] for item in json.loads(out)["edits"]] == [0.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", 1), "limit is 1; it must be at least 2"),
        (("--shown", 0), "shown is 0; it must be at least 1"),
        (("--experts", 0), "experts is 0; it must be at least 1"),
        (("--edits", -1), "edits is -1; it must be at least 0"),
        (("--context", 65), "the context is 65, but this model reads at most 64 tokens"),
        (("--output", "none/page.html"), "none/page.html cannot be written: name a file in a folder that exists"),
        (("--output", "."), ". cannot be written: name a file"),
        (("--knock-out", "0:1"), "layer is 0; the layers with experts are 1 (model.layers.1.ffw)"),
        (("--boost", "1:64=2"), "expert is 64; layer 1 has experts 0 to 63"),
        (("--boost", "1:64=2", "--output", "x.html"), "leave --output out"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, saved, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = command(capsys, saved, "--text", text, *arguments)
    assert code == 2
    *_, sentence = error.splitlines()  # transformers may show a bar above
    assert sentence.startswith("error: ")
    assert message in sentence
    assert list(tmp_path.iterdir()) == []


def test_passages_are_no_text(saved, tmp_path, capsys):
    path = tmp_path / "lambada.jsonl"
    path.write_text('{"context": "a", "continuation": " b"}\n')
    code, _, error = command(capsys, saved, "--text", path)
    assert code == 2
    assert "holds passages and no documents" in error


def test_grids_of_many_sub_keys_are_means_of_blocks(new_model):
    layer = find_inspected_layers(new_model(num_experts=300**2, pairing="shells"))[0]
    record = LayerRecord(layer, shown=1, experts_per_token=1, contexts_per_expert=1)
    record.usage.weight_N[:] = torch.rand(300**2, dtype=torch.float64)
    record.half_use_2Hn[:] = torch.rand(2, 2, 300, dtype=torch.float64)
    grid, side = sub_key_grid(layer, record)
    assert (side, *grid.shape) == (3, 100, 100)
    i, j = 299, 4  # shells: i * i + i + j where i >= j
    block = [record.usage.weight_N[a * a + a + b] for a in (297, 298, 299) for b in (3, 4, 5)]
    expected = sum(block) / 9 / record.usage.weight_N.mean()
    assert grid[i // 3, j // 3].item() == pytest.approx(expected.item())
    halves, step = half_use(record)
    assert (step, *halves.shape) == (2, 2, 2, 150)
    head = record.half_use_2Hn[1, 0]
    assert halves[1, 0, 7].item() == pytest.approx((head[14:16].mean() / head.mean()).item())
    curve = use_curve(record)
    assert curve[0][0] == 1
    assert curve[-1][0] == 300**2
    assert [use for _, use in curve] == sorted((use for _, use in curve), reverse=True)


def test_crowded_and_dead_experts_are_counted(new_model):
    layer = find_inspected_layers(new_model())[0]
    record = LayerRecord(layer, shown=1, experts_per_token=1, contexts_per_expert=1)
    figures = layer_figures(layer, record)
    assert (figures["dead"], figures["crowded"], figures["crowded_share"]) == (64, 0, 0.0)
    record.usage.weight_N[:4] = torch.tensor([30.0, 9.0, 1.0, 0.0], dtype=torch.float64)
    record.usage.retrievals_N[:4] = torch.tensor([3, 2, 1, 1])
    figures = layer_figures(layer, record)
    assert (figures["dead"], figures["crowded"], figures["usage"]) == (60, 2, 3 / 64)
    assert figures["crowded_share"] == pytest.approx(39 / 40)
    assert figures["dead_if_even"] == pytest.approx(64 * (63 / 64) ** 7)
