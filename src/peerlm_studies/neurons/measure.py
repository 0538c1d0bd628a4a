"""How few of a dense model's neurons suffice: learned index, best possible choice and chance, by share retrieved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from peerlm.accounting import model_cost
from peerlm.convert.neurons.index import linear_predictors, relative_error
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
RETRIEVALS = ("learned", "reads", "linear", "oracle", "random")
INCREASES = (0.01, 0.03, 0.1)
"""Increases of perplexity for which the report says how many neurons suffice."""
CENTER_TOKENS = 16384
"""Tokens from which the mean of what is not retrieved is measured."""


class ScoredNeurons(nn.Module):
    """An index that retrieves the neurons with the highest of some scores, (tokens, neurons), whatever these cost."""

    def __init__(self, scores: Callable[[Tensor], Tensor], num_experts: int):
        super().__init__()
        self.scores = scores
        self.retrieved = self.num_experts = num_experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights, all 1, and neuron ids, each (..., 1, K)."""
        scores, ids = self.scores(x).topk(self.retrieved, dim=-1)
        return torch.ones_like(scores)[..., None, :], ids[..., None, :]


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
    retrievals: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    sketch: int = 64,
    fit_tokens: int = 65536,
    fit_steps: int = 300,
    windows: int = 128,
    context: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Replace all dense layers of a model by layers of retrieved neurons, and measure what that costs, by share.

    For each share and way to retrieve: the relative error of each layer's output on the dense model's own inputs, and
    the model's perplexity on held-out windows with all of them replaced. "learned" are product keys, one index per
    layer, learned once for all shares; "reads" computes what gated neurons read and estimates their gates
    (`NeuronReads`); "oracle" takes the neurons with the largest |a_f| ||v_f||, and "linear" those for which ridge
    regression on the layer's input predicts the largest; "random" are product keys before they have learned. All have
    the mean of what they leave out in their output (`NeuronLayer.center`).

    Each measurement is a row of OUTPUT/rows.jsonl and is not made again. OUTPUT also gets report.json and neurons.png.

    Args:
        run, text, data, context: as `load_setup`.
        output: folder to write.
        shares: shares of the neurons to retrieve.
        retrievals: which of `RETRIEVALS`, in this order; none: all but "linear", and "reads" where neurons are gated.
        settings: of `NeuronLayer`, other than the share and those of "reads".
        sketch: as of `NeuronLayer`, for "reads".
        fit_tokens: tokens on which the indices are learned.
        fit_steps: as `steps` of `fit_index`.
        windows: held-out windows that are read, from the first.
        seed: of the sample, the random index and the learning.
        progress: whether to show a bar on stderr, where that is a terminal.

    Returns:
        What report.json holds: dense perplexity, rows, and for each way to retrieve the smallest shares.

    Raises:
        UserError: as `load_setup`, an impossible share, an unknown way to retrieve, "reads" of neurons without gates,
            or an index that cannot be learned.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"share is {share}; it is the share of neurons that a token retrieves: 0 < share <= 1")
    for retrieval in retrievals:
        if retrieval not in RETRIEVALS:
            raise UserError(f"there is no way to retrieve {retrieval!r}; choose from {', '.join(RETRIEVALS)}")
    settings = dict(settings or {})
    setup = load_setup(run, text=text, data=data, settings=settings, context=context)
    gated = all(neurons.gate is not None for neurons in setup.layers.values())
    if not retrievals:
        retrievals = ["learned", *(["reads"] if gated else []), "oracle", "random"]
    elif "reads" in retrievals and not gated:
        raise UserError(f"the neurons of {run} have no gates; 'reads' takes gated neurons, so leave it out")
    settings_of = dict.fromkeys(retrievals, settings) | {"reads": {"index": "reads", "sketch": sketch}}
    rows_path = output / "rows.jsonl"
    common = {"fit_tokens": fit_tokens, "fit_steps": fit_steps, "windows": windows, "seed": seed}
    points = {
        key_of(setup, retrieval=retrieval, share=share, settings=settings_of[retrieval], **common): (retrieval, share)
        for retrieval in retrievals
        for share in shares
    }
    done = {row["key"] for row in read_rows(rows_path)}
    missing = {key: point for key, point in points.items() if key not in done}
    if missing:
        with progress_bar(shown=progress) as bar:
            for row in _measure(setup, missing, settings_of, common, bar):
                append_row(rows_path, row)
    rows = [row for row in read_rows(rows_path) if row["key"] in points]
    report = {
        "dense_perplexity": rows[0]["dense_perplexity"],
        "smallest_shares": {retrieval: smallest_shares(rows, retrieval) for retrieval in retrievals},
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
    setup: NeuronSetup,
    points: Mapping[str, tuple[str, float]],
    settings_of: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any],
    bar: Progress,
) -> Iterator[dict[str, Any]]:
    """Rows of these points, one after the other."""
    sample = draw_windows(setup.train, max(1, common["fit_tokens"] // setup.context), seed=common["seed"])
    inputs = layer_inputs(setup, sample)
    windows = min(common["windows"], len(setup.heldout))
    held_out = torch.stack([setup.heldout[index] for index in range(windows)])
    held_out_inputs = layer_inputs(setup, held_out)
    loss_of = partial(held_out_loss, setup.model, setup.heldout, batch_size=WINDOWS_PER_PASS, limit=windows)
    dense_loss = loss_of()
    dense_cost = model_cost(setup.model, setup.context)
    layers_of = {
        retrieval: _layers(setup, retrieval, inputs, settings_of[retrieval], common, bar)
        for retrieval in dict.fromkeys(retrieval for retrieval, _ in points.values())
    }
    task = bar.add_task("perplexities", total=len(points))
    for key, (retrieval, share) in points.items():
        layers = layers_of[retrieval]
        for path, layer in layers.items():
            layer.share = share
            layer.center(inputs[path][:CENTER_TOKENS])
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
            "flops_per_token": None if retrieval in CEILINGS else cost.forward_flops_per_token,
            "dense_flops_per_token": dense_cost.forward_flops_per_token,
            "settings": settings_of[retrieval],
            **common,
            **provenance(),
        }
        bar.advance(task)


def _layers(
    setup: NeuronSetup,
    retrieval: str,
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    common: Mapping[str, Any],
    bar: Progress,
) -> dict[str, NeuronLayer]:
    """A layer for each dense one, with the index of this way to retrieve."""
    if retrieval in ("learned", "reads"):
        return fitted_layers(setup, inputs, settings, steps=common["fit_steps"], seed=common["seed"], bar=bar)
    torch.manual_seed(common["seed"])
    layers = {path: neuron_layer(neurons, settings) for path, neurons in setup.layers.items()}
    if retrieval in CEILINGS:
        for path, layer in layers.items():
            scores = CEILINGS[retrieval](layer.neurons(), inputs[path])
            layer.index = ScoredNeurons(scores, layer.num_places)  # type: ignore[assignment]
    return layers


def _linear_scores(neurons: Neurons, inputs_TD: Tensor) -> Callable[[Tensor], Tensor]:
    """What ridge regression on these inputs makes of each neuron's importance, without grid or rank."""
    vectors_NE, _ = linear_predictors(neurons, inputs_TD)
    return lambda x: F.linear(x, vectors_NE[:, :-1], vectors_NE[:, -1])


CEILINGS: dict[str, Callable[[Neurons, Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": _linear_scores,
    "oracle": lambda neurons, inputs_TD: neurons.importance,
}
"""Scores that no index affords, from a layer's neurons and sample inputs."""
