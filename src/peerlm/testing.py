"""Inputs, oracles and the error budget that tests and benchmarks share; nothing else imports this.

The oracles compute what `ops` computes by another road: exhaustive search instead of product keys, exact
fractions or Python floats instead of tensors, loops instead of products. Shape suffixes as in
`ops/reference.py`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peerlm.layers import PEER, QueryBatchNorm, Table

ACTIVATION_OF_FLOAT: dict[str, Callable[[float], float]] = {
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: max(z, 0.0),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "one_plus": lambda z: 1 + z,
    "identity": lambda z: z,
}


def weigh_floats(scores: Sequence[float], weighting: str) -> list[float]:
    """A head's weights from its retrieved scores."""
    if weighting == "softmax":
        exponentials = [math.exp(score - max(scores)) for score in scores]
        return [e / sum(exponentials) for e in exponentials]
    if weighting == "sigmoid":
        return [1 / (1 + math.exp(-score)) for score in scores]
    return [max(score, 0.0) if weighting == "relu" else score for score in scores]


def expert_pairs(n: int, pairing: str = "row-major") -> list[tuple[int, int]]:
    """The sub-keys (i, j) of every expert, in the order of ids."""
    if pairing == "row-major":
        return [(i, j) for i in range(n) for j in range(n)]
    return [pair for m in range(n) for pair in [*((i, m) for i in range(m)), *((m, j) for j in range(m + 1))]]


@cache
def _pairs(n: int, pairing: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `expert_pairs`: i and j, (n * n,) each."""
    i_N, j_N = np.array(expert_pairs(n, pairing)).T
    return i_N, j_N


def exhaustive_ids(first: Sequence[float], second: Sequence[float], k: int, pairing: str = "row-major") -> list[int]:
    """The first k of all n * n experts by exact sum of half scores, descending, then by id, ascending."""
    sums = [Fraction(first[i]) + Fraction(second[j]) for i, j in expert_pairs(len(first), pairing)]
    return sorted(range(len(sums)), key=lambda expert_id: (-sums[expert_id], expert_id))[:k]


def all_keys(sub_keys_2HnC: Tensor, pairing: str = "row-major") -> Tensor:
    """Every product key [c_i ; c'_j] written out, in the order of expert ids: (H or 1, n * n, 2 C)."""
    first_HnC, second_HnC = sub_keys_2HnC
    i_N, j_N = torch.tensor(expert_pairs(first_HnC.shape[1], pairing)).T
    return torch.cat([first_HnC[:, i_N], second_HnC[:, j_N]], dim=-1)


def exhaustive_scores(query_THX: Tensor, sub_keys_2HnC: Tensor, pairing: str = "row-major") -> Tensor:
    """Score of every expert, (T, H, n * n), in the dtype of the arguments."""
    keys_HNX = all_keys(sub_keys_2HnC, pairing).expand(query_THX.shape[1], -1, -1)
    return (query_THX[:, :, None] * keys_HNX).sum(dim=-1)


def exhaustive_search(
    query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, pairing: str = "row-major"
) -> tuple[Tensor, Tensor]:
    """The first k of all n * n experts by half scores in float64, and their scores: ids and scores (T, H, k).

    Half scores are summed in extended precision and rounded once, so that equal sub-keys score the same; experts
    are ordered by exact sum, descending, then by id, ascending.
    """
    heads, n = query_THX.shape[1], sub_keys_2HnC.shape[2]
    i_N, j_N = _pairs(n, pairing)
    ids, scores = [], []
    queries = query_THX.detach().double().numpy().astype(np.longdouble)
    keys_2HnC = sub_keys_2HnC.detach().double().expand(-1, heads, -1, -1).numpy().astype(np.longdouble)
    for query_HX in queries:
        for h, query_2C in enumerate(query_HX.reshape(heads, 2, -1)):
            first, second = ((keys_2HnC[s, h] * query_2C[s]).sum(axis=-1).astype(np.float64) for s in (0, 1))
            i, j = first[i_N], second[j_N]
            total = i + j
            shadow = total - i
            residual = (i - (total - shadow)) + (j - shadow)  # Knuth's TwoSum
            among = np.flatnonzero(~(total < -np.partition(-total, k - 1)[k - 1]))  # sorting all takes far longer
            best = among[np.lexsort((among, -residual[among], -total[among]))][:k]
            ids.append(best)
            scores.append(total[best])
    shape = (len(query_THX), heads, k)
    if not ids:
        return torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float64)
    return torch.from_numpy(np.stack(ids)).view(shape), torch.from_numpy(np.stack(scores)).view(shape)


@dataclass(frozen=True, kw_only=True)
class MixInputs:
    """Arguments of `ops.api.mix_experts`: x (T, D), weights and ids (T, P), rows (N, 2 or 3, D)."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    rows: Tensor

    def to(self, dtype: torch.dtype) -> "MixInputs":
        """Copies in `dtype` (ids stay integers) that require gradients."""
        return MixInputs(
            x=_leaf(self.x, dtype),
            weights=_leaf(self.weights, dtype),
            ids=self.ids,
            rows=_leaf(self.rows, dtype),
        )

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of `mix_experts`."""
        return self.x, self.weights, self.ids, self.rows

    def leaves(self) -> list[Tensor]:
        """The tensors that have gradients."""
        return [self.x, self.weights, self.rows]


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def mix_inputs(
    tokens: int,
    per_token: int,
    dim: int,
    num_experts: int,
    *,
    gated: bool = False,
    one_expert: bool = False,
    seed: int = 0,
) -> MixInputs:
    """Standard normal arguments of `mix_experts` in float64, which a cast to bfloat16 leaves as they are.

    With `one_expert` every id is the last one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().double().requires_grad_()

    low = num_experts - 1 if one_expert else 0
    return MixInputs(
        x=normal(tokens, dim),
        weights=normal(tokens, per_token),
        ids=torch.randint(low, num_experts, (tokens, per_token), generator=generator),
        rows=normal(num_experts, 3 if gated else 2, dim),
    )


def loop_mix_experts(inputs: MixInputs, activation: str) -> Tensor:
    """`mix_experts` one neuron at a time, (T, D) float64 without a graph."""
    act = ACTIVATION_OF_FLOAT[activation]
    down, up, *gates = inputs.rows.transpose(0, 1).tolist()
    gate = gates[0] if gates else None
    out = torch.zeros(inputs.x.shape, dtype=torch.float64)
    tokens = zip(inputs.x.tolist(), inputs.weights.tolist(), inputs.ids.tolist(), strict=True)
    for t, (x, weights, ids) in enumerate(tokens):
        for weight, expert_id in zip(weights, ids, strict=True):
            z = _dot(x, down[expert_id])
            hidden = act(z) if gate is None else z * act(_dot(x, gate[expert_id]))
            for d, v in enumerate(up[expert_id]):
                out[t, d] += weight * hidden * v
    return out


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def gradient_of(table: Table) -> Tensor:
    """The gradient of a table's rows, (N, *row_shape), dense, of all its parameters; zeros where they have none."""
    whole = torch.zeros(table.num_rows, *table.row_shape, dtype=table.dtype)
    for parameter, rows in table.parts():
        if parameter.grad is not None:
            whole[rows] = parameter.grad.to_dense()
    return whole


def state_of(optimizer: torch.optim.Optimizer, table: Table) -> dict[str, Any]:
    """What an optimizer remembers of a table's rows, that of all its parameters as one; of numbers the first's."""
    states = [optimizer.state.get(parameter, {}) for parameter in table.row_parameters()]
    assert all(state.keys() == states[0].keys() for state in states)

    def joined(name: str) -> Any:
        values = [state[name] for state in states]
        sizes = [len(parameter) for parameter in table.row_parameters()]
        if all(
            isinstance(value, Tensor) and value.shape[:1] == (size,) for value, size in zip(values, sizes, strict=True)
        ):
            return torch.cat(values)
        return values[0]

    return {name: joined(name) for name in states[0]}


@torch.no_grad()
def loop_peer(layer: PEER, x_TD: Tensor) -> Tensor:
    """A float64 PEER layer in evaluation mode by its equations, with a search of all N experts: (T, dim)."""
    keys = layer.product_keys
    query_TX = x_TD @ keys.query_proj.weight.T
    norm = keys.query_norm
    if isinstance(norm, QueryBatchNorm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        query_TX = (query_TX - norm.running_mean) * scale + norm.bias
    query_THX = query_TX.view(len(x_TD), keys.heads, keys.key_dim)
    if isinstance(norm, nn.LayerNorm):
        centred = query_THX - query_THX.mean(dim=-1, keepdim=True)
        power = centred.square().mean(dim=-1, keepdim=True)
        query_THX = centred / (power + norm.eps).sqrt() * norm.weight + norm.bias
    sub_keys: Tensor = keys.sub_keys
    if keys.key_norm:
        sub_keys = sub_keys / (3 * sub_keys.square().sum(dim=-1, keepdim=True)).sqrt()
    scores_THN = exhaustive_scores(query_THX, sub_keys, keys.pairing)
    ids_THK = scores_THN.argsort(dim=-1, descending=True, stable=True)[..., : keys.experts_per_head]
    weights = [
        [weigh_floats(head, keys.weighting) for head in token] for token in scores_THN.gather(-1, ids_THK).tolist()
    ]
    inputs = MixInputs(
        x=x_TD @ layer.in_proj.weight.T if isinstance(layer.in_proj, nn.Linear) else x_TD,
        weights=torch.tensor(weights, dtype=torch.float64).flatten(1),
        ids=ids_THK.flatten(1),
        rows=layer.experts.read(),
    )
    y_TD = loop_mix_experts(inputs, layer.experts.activation)
    return y_TD @ layer.out_proj.weight.T if isinstance(layer.out_proj, nn.Linear) else y_TD


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| by Frobenius norms; the numerator where exact is all zeros. NaN if either has one."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    size = exact.double().norm().item()
    return (actual.double() - exact.double()).norm().item() / (size or 1.0)


class _Widened(TorchFunctionMode):
    """Every request for float32 is one for float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, widened."""
        func = Tensor.double if func is Tensor.float else func
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def float64() -> Iterator[None]:
    """What is built and computed inside is in float64: where two ways are equal in exact arithmetic, they are here.

    Norms, rotary positions and attention of most models ask for float32 in any dtype of their weights; they get
    float64. Native kernels have no float64, so that "auto" takes the definition. Only what a backward pass computes
    again, of gradient checkpoints, is out of its reach.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def definition(module: nn.Module, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """A copy that computes by the reference backend: the exact judge, to be called in `float64()`, or the plain path.

    Args:
        module: may compute by any backend, in any dtype.
        dtype: of the copy's parameters and buffers; None leaves them as they are, which makes it the plain path.
    """
    twin = copy.deepcopy(module).to(dtype)
    for part in twin.modules():
        if "backend" in vars(part):
            part.backend = "reference"  # type: ignore[assignment]
    return twin


Results = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
"""What a computation gives: one tensor, or several by name or in order."""

_VANISHING = 2.0**-40
"""Smaller, relative to the largest of a result's tensors, is zero but for the rounding of float64."""


def assert_within_budget(actual: Results, plain: Results, exact: Results) -> None:
    """Assert that no tensor errs more than twice as much as the plain computation in the same precision.

    No tolerance is chosen: the budget follows from the arguments, on any machine and SIMD target. A
    tensor's error is the root mean square of its differences from `exact`, in units of the root mean square of
    `exact`; a wrong result is orders of magnitude over budget.

    Why twice: both errors are sums of roundings, and each order of summation draws them again. The ratio of the root
    mean squares of two sets of n normal numbers passes two once in a million from some 50 numbers on; where there are
    fewer, it may be as large as it is once in a million. Entries of a row (a vector along the last dimension; of a
    vector, an entry) share roundings, and large rows hide small ones: n is (sum of s)^2 / sum of s^2 over the rows'
    sums of squares s, the degrees of freedom of their errors' sum (Satterthwaite 1946, An Approximate Distribution of
    Estimates of Variance Components). One rounding of every entry is granted besides. Where a tensor vanishes in exact
    arithmetic, the unit is that of the largest tensor.

    Args:
        actual: what is tested; one tensor, or several in a mapping or a sequence. Sparse ones count as dense.
        plain: the definition, computed in the precision of `actual`: the same structure, shapes and dtypes.
        exact: the definition in float64 from the same numbers.

    Raises:
        AssertionError: over the budget or not finite where `exact` is; the message names the tensor.
    """
    actuals, plains, exacts = _by_name(actual), _by_name(plain), _by_name(exact)
    assert actuals.keys() == plains.keys() == exacts.keys(), (list(actuals), list(plains), list(exacts))
    largest = max((_root_mean_square(value) for value in exacts.values()), default=0.0)
    for name, value in exacts.items():
        ours, theirs = actuals[name], plains[name]
        assert ours.shape == theirs.shape == value.shape, (name, ours.shape, theirs.shape, value.shape)
        assert (ours.dtype, value.dtype) == (theirs.dtype, torch.float64), (name, ours.dtype, theirs.dtype, value.dtype)
        size = _root_mean_square(value)
        unit = size if size > _VANISHING * largest else largest or 1.0
        error, plain_error = (_root_mean_square(found.double() - value) / unit for found in (ours, theirs))
        budget = _factor(int(_independent_rows(value))) * plain_error + torch.finfo(ours.dtype).eps
        assert error <= budget, f"{name}: relative error {error:.3g} is over the budget of {budget:.3g}".lstrip(": ")


@cache
def _factor(rows: int) -> float:
    """What the ratio of the root mean squares of two sets of `rows` normal numbers passes once in a million, or two.

    Its square is F distributed. With 2 m degrees of freedom twice, the chance to pass x is that of m heads or more
    among 2 m - 1 coins that show heads with the chance 1 / (1 + x).
    """
    if rows >= _MANY:
        return 2.0
    half = max(1, rows // 2)
    factor = 2.0
    while True:
        heads = 1 / (1 + factor**2)
        tosses = 2 * half - 1
        chances = (math.comb(tosses, j) * heads**j * (1 - heads) ** (tosses - j) for j in range(half, 2 * half))
        if sum(chances) < 1e-6:
            return factor
        factor *= 1.05


_MANY = 64
"""Rows from which `_factor` is two."""


def _by_name(results: Results) -> dict[str, Tensor]:
    if isinstance(results, Tensor):
        results = {"": results}
    named = results.items() if isinstance(results, Mapping) else ((str(i), value) for i, value in enumerate(results))
    return {name: value.detach().to_dense() for name, value in named}


def _independent_rows(value: Tensor) -> float:
    squares = value.square()
    squares = squares.sum(dim=-1) if value.ndim > 1 else squares
    return (squares.sum() ** 2 / squares.square().sum()).nan_to_num(1.0).item()


def _root_mean_square(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item() if value.numel() else 0.0
