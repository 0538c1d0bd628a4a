"""How few of a dense model's neurons suffice: learned index, best possible choice and chance, by share retrieved."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from peerlm.accounting import model_cost
from peerlm.convert.neurons.index import relative_error
from peerlm.convert.neurons.layer import NeuronLayer, neuron_layer
from peerlm.convert.neurons.weights import Neurons
from peerlm.errors import UserError
from peerlm.evaluate import held_out_loss
from peerlm.evaluate.progress import progress_bar
from peerlm.files import write_json
from peerlm_studies.neurons.figures import plot_neurons
from peerlm_studies.neurons.setup import (
    WINDOWS_PER_PASS,
    NeuronSetup,
    draw_windows,
    fitted_layers,
    key_of,
    layer_inputs,
    load_setup,
    replaced,
)
from peerlm_studies.rows import append_row, provenance, read_rows

SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
RETRIEVALS = ("learned", "oracle", "random")
INCREASES = (0.01, 0.03, 0.1)
"""Increases of perplexity for which the report says how many neurons suffice."""
CENTER_TOKENS = 16384
"""Tokens from which the mean of what is not retrieved is measured."""


class ImportantNeurons(nn.Module):
    """The best choice as far as single neurons go: those with the largest |a_f| ||v_f||, which costs all of them."""

    def __init__(self, neurons: Neurons, retrieved: int):
        super().__init__()
        self.neurons = neurons
        self.retrieved = retrieved
        self.num_experts = len(neurons.down)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights, all 1, and neuron ids, each (..., 1, K)."""
        importance, ids = self.neurons.importance(x).topk(self.retrieved, dim=-1)
        return torch.ones_like(importance)[..., None, :], ids[..., None, :]


class WholeLayer(nn.Module):
    """A layer of retrieved neurons computed from all of them, those not retrieved times zero: equal to rounding.

    For many tokens on a CPU this is several times as fast as gathering a large share of the rows for each.
    """

    def __init__(self, layer: NeuronLayer):
        super().__init__()
        self.layer = layer
        self.neurons = layer.neurons()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim)."""
        x_TD = x.flatten(0, -2)
        activations_TN = self.neurons.activations(x_TD) * self.layer.retrieved_mask(x_TD)
        y_TD = activations_TN @ self.neurons.up + (self.layer.output_bias + self.layer.mean_rest).to(x.dtype)
        return y_TD.view(x.shape)


def measure_neurons(
    run: str | Path,
    output: Path,
    *,
    text: Sequence[str | Path] = (),
    data: str | Path | None = None,
    shares: Sequence[float] = SHARES,
    settings: Mapping[str, Any] | None = None,
    fit_tokens: int = 65536,
    fit_steps: int = 300,
    windows: int = 128,
    context: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Replace all dense layers of a model by layers of retrieved neurons, and measure what that costs, by share.

    For each share and way to retrieve: the relative error of each layer's output on the dense model's own inputs, and
    the model's perplexity on held-out windows with all of them replaced. "learned" is one index per layer, learned once
    for all shares; "oracle" takes the neurons with the largest |a_f| ||v_f||; "random" is the learned index's
    architecture before it has learned. All three have the mean of what they leave out in their output
    (`NeuronLayer.center`).

    Each measurement is a row of OUTPUT/rows.jsonl and is not made again. OUTPUT also gets report.json and neurons.png.

    Args:
        run, text, data, context: as `load_setup`.
        output: folder to write.
        shares: shares of the neurons to retrieve.
        settings: of `NeuronLayer`, other than the share.
        fit_tokens: tokens on which the indices are learned.
        fit_steps: as `steps` of `fit_index`.
        windows: held-out windows that are read, from the first.
        seed: of the sample, the random index and the learning.
        progress: whether to show a bar on stderr, where that is a terminal.

    Returns:
        What report.json holds: dense perplexity, rows, and for each way to retrieve the smallest shares.

    Raises:
        UserError: as `load_setup`, an impossible share, or an index that cannot be learned.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"share is {share}; it is the share of neurons that a token retrieves: 0 < share <= 1")
    settings = dict(settings or {})
    setup = load_setup(run, text=text, data=data, settings=settings, context=context)
    rows_path = output / "rows.jsonl"
    common = {"settings": settings, "fit_tokens": fit_tokens, "fit_steps": fit_steps, "windows": windows, "seed": seed}
    points = {
        key_of(setup, retrieval=retrieval, share=share, **common): (retrieval, share)
        for retrieval in RETRIEVALS
        for share in shares
    }
    done = {row["key"] for row in read_rows(rows_path)}
    missing = {key: point for key, point in points.items() if key not in done}
    if missing:
        with progress_bar(shown=progress) as bar:
            for row in _measure(setup, missing, common, bar):
                append_row(rows_path, row)
    rows = [row for row in read_rows(rows_path) if row["key"] in points]
    report = {
        "dense_perplexity": rows[0]["dense_perplexity"],
        "smallest_shares": {retrieval: smallest_shares(rows, retrieval) for retrieval in RETRIEVALS},
        "rows": rows,
    }
    write_json(output / "report.json", report)
    plot_neurons(rows, output / "neurons.png")
    return report


def smallest_shares(rows: Sequence[Mapping[str, Any]], retrieval: str) -> dict[str, float | None]:
    """For each of `INCREASES`, the smallest share whose perplexity is within it, between measured shares interpolated.

    The logarithm of the perplexity is taken as linear in the share from one measured share to the next; the answer is
    where it last comes under the bound on the way to the largest share. None where even that is above the bound.
    """
    points = sorted(
        (row["share"], math.log(row["perplexity"] / row["dense_perplexity"]))
        for row in rows
        if row["retrieval"] == retrieval
    )
    return {f"{increase:.0%}": _crossing(points, math.log1p(increase)) for increase in INCREASES}


def _crossing(points: Sequence[tuple[float, float]], bound: float) -> float | None:
    if points[-1][1] > bound:
        return None
    for (share, value), (next_share, next_value) in zip(points[-2::-1], points[:0:-1], strict=True):
        if value > bound:
            return share + (next_share - share) * (value - bound) / (value - next_value)
    return points[0][0]


def _measure(
    setup: NeuronSetup, points: Mapping[str, tuple[str, float]], common: Mapping[str, Any], bar: Progress
) -> Iterator[dict[str, Any]]:
    """Rows of these points, one after the other."""
    seed, settings = common["seed"], common["settings"]
    sample = draw_windows(setup.train, max(1, common["fit_tokens"] // setup.context), seed=seed)
    inputs = layer_inputs(setup, sample)
    windows = min(common["windows"], len(setup.heldout))
    held_out = torch.stack([setup.heldout[index] for index in range(windows)])
    held_out_inputs = layer_inputs(setup, held_out)
    loss_of = partial(held_out_loss, setup.model, setup.heldout, batch_size=WINDOWS_PER_PASS, limit=windows)
    dense_loss = loss_of()
    dense_cost = model_cost(setup.model, setup.context)
    learned: dict[str, NeuronLayer] = {}
    if any(retrieval == "learned" for retrieval, _ in points.values()):
        learned = fitted_layers(setup, inputs, settings, steps=common["fit_steps"], seed=seed, bar=bar)
    task = bar.add_task("perplexities", total=len(points))
    for key, (retrieval, share) in points.items():
        layers = {}
        torch.manual_seed(seed)
        for path, neurons in setup.layers.items():
            layer = learned[path] if retrieval == "learned" else neuron_layer(neurons, settings)
            layer.share = share
            if retrieval == "oracle":
                layer.index = ImportantNeurons(layer.neurons(), layer.index.retrieved)  # type: ignore[assignment]
            layer.center(inputs[path][:CENTER_TOKENS])
            layers[path] = layer
        computed = {path: WholeLayer(layer) for path, layer in layers.items()}
        errors = {path: relative_error(computed[path], setup.layers[path], held_out_inputs[path]) for path in layers}
        with replaced(setup, computed):
            loss = loss_of()
        with replaced(setup, layers):
            cost = model_cost(setup.model, setup.context)
        yield {
            "key": key,
            "retrieval": retrieval,
            "share": share,
            "neurons_per_token": [layer.index.retrieved for layer in layers.values()],
            "errors": errors,
            "loss": loss,
            "perplexity": math.exp(loss),
            "dense_perplexity": math.exp(dense_loss),
            "flops_per_token": cost.forward_flops_per_token if retrieval != "oracle" else None,
            "dense_flops_per_token": dense_cost.forward_flops_per_token,
            **common,
            **provenance(),
        }
        bar.advance(task)
