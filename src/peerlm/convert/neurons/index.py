"""Learn the index of a layer's neurons from samples of the layer's inputs, without the rest of the model.

Shape suffixes: T tokens, B of them in a batch, D model width, E = D + 1 with a constant, N places for neurons, S
shares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.convert.neurons.keys import NeuronKeys
from peerlm.convert.neurons.layer import NeuronLayer
from peerlm.convert.neurons.placement import grid_means, misfit, place_neurons
from peerlm.convert.neurons.reads import NeuronReads, fit_sketch
from peerlm.convert.neurons.weights import Neurons
from peerlm.layers.checks import check_sizes

SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Shares of the neurons for which one index is learned: each asks whether a neuron is among so many."""
INITIAL_SPREAD = 3.0
"""Standard deviation of scores, which are log-odds, before training."""
WARMUP_STEPS = 20
ERROR_TOKENS = 1024
"""Tokens on which a layer's error is measured; up to twice as many."""


@dataclass(frozen=True, kw_only=True)
class IndexFit:
    """How an index was learned."""

    misfit: float
    """Share of the variance of neurons' linear predictors that a sum of row and column misses, 0 to 1; of an index
    "reads", of gates that the sketch misses."""
    first_loss: float
    """Loss of the first batch, weighted nats per neuron and share; NaN without training."""
    last_loss: float
    """Mean loss of the last tenth of the batches."""
    error: float
    """|y - y_dense| / |y_dense| of the layer's output with its share of neurons, on inputs that it learned from."""


def fit_index(
    layer: NeuronLayer,
    inputs_TD: Tensor,
    *,
    steps: int = 300,
    batch_size: int = 1024,
    learning_rate: float = 1e-2,
    sweeps: int = 300,
    seed: int = 0,
    report: Callable[[int, int], object] | None = None,
) -> IndexFit:
    """Learn which neurons matter to which input: place them, then train query and sub-keys; `mean_rest` is measured.

    A neuron matters as much as it adds to the output, |a_f| ||v_f||. Its best linear predictor (ridge regression)
    decides its place, and the sums of each row's and column's predictors are the first query and sub-keys. AdamW
    continues from there: for each of `SHARES`, it fits log-odds that a neuron is among that share of the most important
    ones (binary cross-entropy). Each decision is weighted by the cost of a mistake, the difference of squared
    importance from the last neuron chosen. One index serves all shares. Rows change places; what the layer computes
    with all of them does not.

    All this is for product keys. An index "reads" has nothing to train, place or draw: see `fit_sketch`.

    Deterministic from the seed and the number of threads. Nothing of the rest of the model is needed, and only the
    layer's index, order of rows and `mean_rest` change.

    Args:
        layer: a layer with its neurons; one that was trained since is fitted to what it has become.
        inputs_TD: what the layer reads on sample text, (T, dim), a few ten thousand tokens; may be memory-mapped,
            batches are moved to the layer's device.
        steps: batches; 0 keeps the index of the linear predictors.
        batch_size: tokens of a batch, drawn with replacement.
        learning_rate: peak of AdamW's, after a short warmup and before half a cosine.
        sweeps: as `place_neurons`.
        seed: of placement and batches.
        report: called with batches done, and all, after each; of an index "reads" once.

    Raises:
        ValueError: inputs of another shape, too few, or with NaN or infinities; sizes that are impossible.
        FloatingPointError: the loss became NaN or infinite.
    """
    check_sizes(batch_size=batch_size)
    if steps < 0 or sweeps < 0:
        raise ValueError(f"steps is {steps} and sweeps is {sweeps}; they must be 0 or more")
    if inputs_TD.ndim != 2 or inputs_TD.shape[1] != layer.dim or len(inputs_TD) < 2:
        raise ValueError(
            f"inputs have shape {tuple(inputs_TD.shape)}; pass what the layer reads, (2 tokens or more, {layer.dim})"
        )
    if isinstance(layer.index, NeuronReads):
        missed = fit_sketch(layer.index, layer.neurons(), inputs_TD, batch_size)
        first_loss = last_loss = math.nan
        if report is not None:
            report(1, 1)
    else:
        missed = _place(layer, layer.index, inputs_TD, batch_size, sweeps, seed)
        generator = torch.Generator().manual_seed(seed)
        first_loss, last_loss = _train(
            layer, layer.index, inputs_TD, steps, batch_size, learning_rate, generator, report
        )
    layer.center(_moved(inputs_TD[:: max(1, len(inputs_TD) // 32768)], layer))
    return IndexFit(
        misfit=missed,
        first_loss=first_loss,
        last_loss=last_loss,
        error=relative_error(
            layer, layer.neurons(), _moved(inputs_TD[:: max(1, len(inputs_TD) // ERROR_TOKENS)], layer)
        ),
    )


@torch.no_grad()
def relative_error(layer: nn.Module, dense: Callable[[Tensor], Tensor], inputs_TD: Tensor) -> float:
    """|y - y_dense| over |y_dense|, Frobenius norms over all tokens; 0 where the dense layer has no output."""
    difference = norm = 0.0
    for x_TD in inputs_TD.split(4096):
        exact_TD = dense(x_TD)
        difference += (layer(x_TD) - exact_TD).double().square().sum().item()
        norm += exact_TD.double().square().sum().item()
    return math.sqrt(difference / norm) if norm else 0.0


def _place(layer: NeuronLayer, index: NeuronKeys, inputs_TD: Tensor, batch_size: int, sweeps: int, seed: int) -> float:
    """Place the neurons by their linear predictors, from which the index begins; the misfit of the places."""
    vectors_NE, whitener_EE = linear_predictors(layer.neurons(), inputs_TD, batch_size)
    spread_NE = vectors_NE @ whitener_EE
    heads, n = index.heads, index.sub_keys.shape[2]
    order_N = place_neurons(spread_NE, heads, n, sweeps=sweeps, seed=seed)
    layer.place(order_N)
    scale = INITIAL_SPREAD / spread_NE.norm(dim=-1).square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    _load_index(index, *grid_means(vectors_NE[order_N] * scale, heads, n))
    return misfit(spread_NE[order_N], heads, n)


@torch.no_grad()
def linear_predictors(neurons: Neurons, inputs_TD: Tensor, batch_size: int = 1024) -> tuple[Tensor, Tensor]:
    """Ridge regression of neurons' importance on inputs and a constant: (N, E), and the root of their moments (E, E).

    The distance of two predictors, multiplied by that root, is the root mean square of their difference over the
    inputs.
    """
    places, dim = neurons.down.shape
    moments_EE = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
    products_EN = torch.zeros(dim + 1, places, dtype=torch.float64)
    for batch_TD in inputs_TD.split(4 * batch_size):
        x_TD = batch_TD.to(neurons.down)
        x_TE = F.pad(x_TD, (0, 1), value=1.0).double()
        moments_EE += (x_TE.T @ x_TE).cpu()
        products_EN += (x_TE.T @ neurons.importance(x_TD).double()).cpu()
    if not (moments_EE.isfinite().all() and products_EN.isfinite().all()):
        raise ValueError("inputs hold NaN or infinities, or neurons make some of them; look for the layer that does")
    moments_EE /= len(inputs_TD)
    products_EN /= len(inputs_TD)
    ridge = 1e-4 * moments_EE.diagonal().mean() * torch.eye(dim + 1, dtype=torch.float64)
    vectors_NE = torch.linalg.solve(moments_EE + ridge, products_EN).T
    values, basis = torch.linalg.eigh(moments_EE)
    root_EE = (basis * values.clamp(min=0).sqrt()) @ basis.T
    dtype = torch.promote_types(neurons.down.dtype, torch.float32)
    return vectors_NE.to(neurons.down.device, dtype), root_EE.to(neurons.down.device, dtype)


@torch.no_grad()
def _load_index(index: NeuronKeys, *halves_HnE: Tensor) -> None:
    """Factor the predictors of rows, and of columns, into sub-keys and a query, as well as key_dim allows."""
    size = index.key_dim // 2
    weight = index.query_proj.weight.view(index.heads, 2, size, index.dim)
    bias = index.query_proj.bias.view(index.heads, 2, size)
    index.sub_keys.zero_()
    weight.zero_()
    bias.zero_()
    for half, vectors_HnE in enumerate(halves_HnE):
        left, values, right = torch.linalg.svd(vectors_HnE, full_matrices=False)
        rank = min(size, values.shape[-1])
        root = values[:, :rank].sqrt()
        index.sub_keys[half, :, :, :rank] = left[:, :, :rank] * root[:, None]
        query = right[:, :rank] * root[..., None]
        weight[:, half, :rank] = query[..., :-1].to(weight)
        bias[:, half, :rank] = query[..., -1].to(bias)


def _train(
    layer: NeuronLayer,
    index: NeuronKeys,
    inputs_TD: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    report: Callable[[int, int], object] | None,
) -> tuple[float, float]:
    """AdamW on the index; the loss of the first batch, and the mean over the last tenth of them."""
    neurons = layer.neurons()
    counts = sorted({max(1, round(share * layer.hidden)) for share in SHARES} - {layer.num_places})
    counts_S = torch.tensor(counts, device=index.sub_keys.device)
    losses: list[float] = []
    offsets_S: Tensor | None = None
    parameters = list(index.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
        for step in range(steps):
            x_BD = _moved(inputs_TD[torch.randint(len(inputs_TD), (batch_size,), generator=generator)], layer)
            scores_BN = index.scores(x_BD)
            if offsets_S is None:  # log-odds begin at zero where a neuron is the last of so many
                ranked_BN = scores_BN.detach().sort(dim=-1, descending=True).values
                offsets_S = torch.nn.Parameter(ranked_BN[:, counts_S - 1].mean(dim=0))
                optimizer.add_param_group({"params": [offsets_S]})
            loss = _cost_of_mistakes(scores_BN, neurons.importance(x_BD), counts_S, offsets_S)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss of the index is {loss.item()} at step {step + 1}; take a learning_rate below "
                    f"{learning_rate}"
                )
            losses.append(loss.item())
            rate = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report is not None:
                report(step + 1, steps)
    finally:
        for parameter, wanted in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None
    last = losses[-max(1, steps // 10) :]
    return (losses[0], sum(last) / len(last)) if losses else (math.nan, math.nan)


def _cost_of_mistakes(scores_BN: Tensor, importance_BN: Tensor, counts_S: Tensor, offsets_S: Tensor) -> Tensor:
    """Mean over shares of the cross-entropy of "among the most important so many", weighted by squared importance."""
    ranked_BN = importance_BN.sort(dim=-1, descending=True).values
    total = scores_BN.new_zeros(())
    for count, offset in zip(counts_S.tolist(), offsets_S, strict=True):
        last_B1 = ranked_BN[:, count - 1 : count]
        wanted_BN = (importance_BN >= last_B1).to(scores_BN.dtype)
        cost_BN = (importance_BN.square() - last_B1.square()).abs()
        cost_BN = (cost_BN / cost_BN.mean().clamp(min=torch.finfo(cost_BN.dtype).tiny)).to(scores_BN.dtype)
        total = total + F.binary_cross_entropy_with_logits(scores_BN - offset, wanted_BN, cost_BN)
    return total / len(counts_S)


def _moved(x: Tensor, layer: NeuronLayer) -> Tensor:
    return x.to(layer.output_bias)
