from huggingface_hub import ModelCard

from peerlm.train import train


def test_a_finished_run_has_a_card(configure, data) -> None:
    result = train(configure(budget={"steps": 2}), progress=False)
    card = ModelCard.load(result.run / "model" / "README.md")
    (figure,) = card.data.eval_results
    assert figure.metric_value == round(result.summary["perplexity"], 4)
    assert "Import peerlm before you load the model." in card.text
    assert card.data.tags == ["peerlm", "dense", "peer"]
    assert f"{result.summary['total_parameters']:,} parameters" in card.text
    assert f"{result.summary['tokens']:,} tokens of `{data}`" in card.text
    share = result.summary["usage"]["model.layers.1.ffw.product_keys"]["share"]
    assert f"| `model.layers.1.ffw.product_keys` | {100 * share:.1f}% |" in card.text


def test_a_run_in_the_working_directory_has_the_name_of_its_folder(configure, tmp_path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = train(configure(run=".", budget={"steps": 1}), progress=False)
    assert ModelCard.load(result.run / "model" / "README.md").data.model_name == "here"


def test_without_layers_that_retrieve_there_is_no_table_of_usage(configure) -> None:
    result = train(configure(budget={"steps": 1}, model={"ffw_layers": "dense"}), progress=False)
    assert "experts in use" not in ModelCard.load(result.run / "model" / "README.md").text
