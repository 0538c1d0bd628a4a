"""What AdamW does to a row in the steps in which its gradient is zero, as a sum of a few fractions.

A row was last updated in step s; its moments then were m and v. Had AdamW visited it in each step s + k up to
now, t, it would have moved the weights by (Loshchilov 2019, algorithm 2, with g = 0)

    w <- P(s, t) w - sum over k of  a_k m / (sqrt(v) / c_k + eps)
    a_k = lr_{s+k} beta1^k / (1 - beta1^{s+k}) P(s+k, t)        c_k = sqrt(1 - beta2^{s+k}) / beta2^{k/2}
    P(i, j) = product of (1 - lr_n wd) over i < n <= j

The sum is a Stieltjes function of r = sqrt(v) / eps: sum a_k c_k / (r + c_k). The Gauss rule sum B_j / (r + R_j) of few
nodes, which agrees with it at chosen r, takes its place (docs/mathematics.md, "Stale rows"). Scalars only, in float64.
Shape suffixes: S distinct steps s, K missed steps, J nodes.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from peerlm.ops import api
from peerlm.ops.row_updates import CatchUpRules

MAX_NODES = 8
TOLERANCE = 1e-7
"""Largest error of a rule, relative to the sum; more nodes are taken until it is met, up to `MAX_NODES`."""
_WORST_TOLERATED = 1e-6
_TAIL = 1e-10
_ENOUGH_UP_TO = torch.tensor([1.001, 1.35, 2.8, 5.6, 11.0, 19.0, 37.0], dtype=torch.float64)
"""Spreads of c, largest to smallest, up to which 1, 2, ... nodes met the tolerance: where the search begins."""
_PROBES = 16
_RULES_AT_ONCE = 256


@dataclass(frozen=True)
class RateHistory:
    """The learning rates of the steps after `start`, all float64 on the CPU."""

    start: int
    learning_rates: Tensor
    """(n,): entry i is that of step start + 1 + i."""
    log_keep: Tensor
    """(n + 1,): entry i is log P(start, start + i)."""

    @staticmethod
    def empty(start: int) -> "RateHistory":
        """Nothing is known before step start + 1."""
        return RateHistory(start, torch.zeros(0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    @property
    def now(self) -> int:
        """The last step."""
        return self.start + len(self.learning_rates)

    def append(self, learning_rate: float, weight_decay: float) -> "RateHistory":
        """With one more step. Raises ValueError where weight decay would turn weights round."""
        if learning_rate * weight_decay >= 1:
            raise ValueError(f"lr * weight_decay = {learning_rate} * {weight_decay} must be below 1: lower either")
        keep = self.log_keep[-1:] + math.log1p(-learning_rate * weight_decay)
        rate = torch.tensor([learning_rate], dtype=torch.float64)
        return RateHistory(self.start, torch.cat([self.learning_rates, rate]), torch.cat([self.log_keep, keep]))


def missed_steps_that_matter(beta1: float, beta2: float) -> int:
    """How many steps after its last gradient a row still moves by momentum: terms shrink as (beta1 / sqrt(beta2))^k."""
    shrink = beta1 / math.sqrt(beta2)
    return max(1, math.ceil(math.log(_TAIL * (1 - shrink)) / math.log(shrink)))


def missed_steps(history: RateHistory, since_S: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """The coefficients a and c of the sum over missed steps.

    Args:
        history: up to the present step t.
        since_S: (S,) int64, the steps s < t.
        beta1, beta2: AdamW's; 0 < beta1 and beta1^2 < beta2, so that a row left alone comes to rest.

    Returns:
        a_SK, c_SK, float64. K ends where the rest no longer matters; entries beyond t have a = 0 and c = c_1.
    """
    longest = history.now - int(since_S.min())
    k_K = torch.arange(1, min(longest, missed_steps_that_matter(beta1, beta2)) + 1)
    step_SK = since_S[:, None] + k_K
    real_SK = step_SK <= history.now
    index_SK = (step_SK - history.start).clamp_max_(len(history.learning_rates))
    keep_SK = (history.log_keep[-1] - history.log_keep[index_SK]).exp_()
    k_K, step_SK = k_K.double(), step_SK.double()
    a_SK = history.learning_rates[index_SK - 1] * keep_SK * beta1**k_K / -torch.expm1(step_SK * math.log(beta1))
    c_SK = torch.sqrt(-torch.expm1(step_SK * math.log(beta2))) * beta2 ** (-0.5 * k_K)
    return a_SK * real_SK, torch.where(real_SK, c_SK, c_SK[:, :1])


def gauss_rules(a_SK: Tensor, c_SK: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """B_SJ and R_SJ with J = num_nodes: sum B_j / (r + R_j) equals sum a_k c_k / (r + c_k) at 2J chosen r.

    These are r = 0, r = infinity and 2J - 2 values log-spaced from the smallest c to the one below which
    0.9999 of the sum's mass a_k c_k lies. A rule with this property is the Gauss rule of the measure
    a_k c_k / prod (c + r_i) over the finite r_i, its weights multiplied by that product (Gonchar & Lopez 1978 on
    multipoint Pade approximants of Stieltjes functions). It comes from J steps of Lanczos and the
    eigenvalues of a J x J matrix (Golub & Welsch 1969). With J >= K it is the sum itself.
    """
    points_SI = _points(a_SK, c_SK, 2 * num_nodes - 2)
    scale_S1 = c_SK[:, :1]
    measure_SK = a_SK * c_SK / _product(c_SK, points_SI, scale_S1)
    mass_S1 = measure_SK.sum(-1, keepdim=True)
    q_SK = (measure_SK / mass_S1.clamp_min(torch.finfo(torch.float64).tiny)).sqrt_()
    basis_SJK = a_SK.new_zeros(len(a_SK), num_nodes, a_SK.shape[1])
    basis_SJK[:, 0] = q_SK
    matrix_SJJ = a_SK.new_zeros(len(a_SK), num_nodes, num_nodes)
    for j in range(num_nodes):
        z_SK = c_SK * basis_SJK[:, j]
        matrix_SJJ[:, j, j] = (z_SK * basis_SJK[:, j]).sum(-1)
        if j + 1 == num_nodes:
            break
        for _ in range(2):  # once more, against rounding: nodes may lie close together
            known_SJK = basis_SJK[:, : j + 1]
            overlap_SJ = torch.einsum("sjk,sk->sj", known_SJK, z_SK)
            z_SK = z_SK - torch.einsum("sj,sjk->sk", overlap_SJ, known_SJK)
        norm_S1 = z_SK.norm(dim=-1, keepdim=True)
        # Where the measure has no more points than nodes, what is left is rounding: a node of its own, without weight.
        norm_S1 = torch.where(norm_S1 > 1e-14 * matrix_SJJ[:, j, j, None], norm_S1, 0.0)
        matrix_SJJ[:, j, j + 1] = matrix_SJJ[:, j + 1, j] = norm_S1[:, 0]
        basis_SJK[:, j + 1] = torch.where(norm_S1 > 0, z_SK / norm_S1, 0.0)
    nodes_SJ, vectors_SJJ = torch.linalg.eigh(matrix_SJJ)
    weights_SJ = vectors_SJJ[:, 0, :] ** 2 * mass_S1 * _product(nodes_SJ, points_SI, scale_S1)
    empty_SJ = nodes_SJ < 0.5 * c_SK.amin(-1, keepdim=True)
    return weights_SJ.masked_fill(empty_SJ, 0.0), torch.where(empty_SJ, scale_S1, nodes_SJ)


def rule_error(a_SK: Tensor, c_SK: Tensor, weights_SJ: Tensor, nodes_SJ: Tensor) -> Tensor:
    """(S,): the largest relative error of each rule, at probes spread over the r where its error is not tiny."""
    probes_SR, true_SR = _probes(a_SK, c_SK)
    return _error_at_probes(probes_SR, true_SR, weights_SJ, nodes_SJ)


def _probes(a_SK: Tensor, c_SK: Tensor) -> tuple[Tensor, Tensor]:
    low_S1, high_S1 = _extent(a_SK, c_SK)
    probes_SR = low_S1 * (2 * high_S1 / low_S1) ** torch.linspace(-0.5, 1.5, _PROBES, dtype=torch.float64)
    return probes_SR, _sum_of_fractions(a_SK * c_SK, c_SK, probes_SR)


def _error_at_probes(probes_SR: Tensor, true_SR: Tensor, weights_SJ: Tensor, nodes_SJ: Tensor) -> Tensor:
    error_SR = (_sum_of_fractions(weights_SJ, nodes_SJ, probes_SR) - true_SR).abs()
    return torch.where(error_SR == 0, 0.0, error_SR / true_SR).amax(-1)  # NaN stays, and meets no tolerance


def _sum_of_fractions(weights_SX: Tensor, nodes_SX: Tensor, probes_SR: Tensor) -> Tensor:
    return torch.einsum("sx,srx->sr", weights_SX, 1 / (probes_SR[:, :, None] + nodes_SX[:, None, :]))


def _points(a_SK: Tensor, c_SK: Tensor, num_points: int) -> Tensor:
    """(S, num_points + 1): zero, then log-spaced points where the sum has its mass."""
    low_S1, high_S1 = _extent(a_SK, c_SK)
    at_I = torch.linspace(0, 1, num_points, dtype=torch.float64) if num_points else torch.zeros(0, dtype=torch.float64)
    return torch.cat([torch.zeros_like(low_S1), low_S1 * (high_S1 / low_S1) ** at_I], dim=-1)


def _extent(a_SK: Tensor, c_SK: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest c, and that below which 0.9999 of the mass a c lies; c grows along k. Each (S, 1)."""
    mass_SK = (a_SK * c_SK).cumsum(-1)
    last_S1 = (mass_SK < 0.9999 * mass_SK[:, -1:]).sum(-1, keepdim=True)
    return c_SK[:, :1], c_SK.gather(-1, last_S1)


def _product(x_SX: Tensor, points_SI: Tensor, scale_S1: Tensor) -> Tensor:
    """Product over i of (x + r_i) / scale, the scale guarding against overflow."""
    product = torch.ones_like(x_SX)
    for point_S1 in points_SI.split(1, dim=-1):
        product = product * ((x_SX + point_S1) / scale_S1)
    return product


def catch_up_rules(
    history: RateHistory,
    since_S: Tensor,
    beta1: float,
    beta2: float,
    *,
    tolerance: float = TOLERANCE,
) -> CatchUpRules:
    """The rules that bring rows last right at the distinct steps since_S, ascending int64, to the present step.

    Each has as many nodes as it takes to meet the tolerance at probes spread over all r, `MAX_NODES` where none
    does. With beta1 = 0 rows only decay, and rules have no nodes.
    """
    first_step = int(since_S[0])
    index = torch.full((history.now - first_step + 1,), -1, dtype=torch.int32)
    index[since_S - first_step] = torch.arange(len(since_S), dtype=torch.int32)
    decay_S = -torch.expm1(history.log_keep[-1] - history.log_keep[since_S - history.start])
    num_nodes_S = torch.zeros(len(since_S), dtype=torch.int32)
    weights_SJ = decay_S.new_zeros(len(since_S), MAX_NODES)
    nodes_SJ = decay_S.new_ones(len(since_S), MAX_NODES)
    if beta1 > 0:
        for part in torch.arange(len(since_S)).split(_RULES_AT_ONCE):
            a_SK, c_SK = missed_steps(history, since_S[part], beta1, beta2)
            rules = api.fit_rules(a_SK, c_SK, tolerance=tolerance, spreads=_ENOUGH_UP_TO, num_probes=_PROBES)
            num_nodes_S[part], weights_SJ[part], nodes_SJ[part] = rules or fit_rules(a_SK, c_SK, tolerance)
    return CatchUpRules(first_step, index, decay_S, num_nodes_S, weights_SJ, nodes_SJ)


def fit_rules(a_SK: Tensor, c_SK: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor, Tensor]:
    """For each sum the rule of fewest nodes that meets the tolerance, at least as many as its spread of c asks for.

    Returns:
        How many nodes count, (S,) int32; weights and nodes, (S, MAX_NODES), 0 and 1 beyond these.
    """
    num_nodes_S = torch.zeros(len(a_SK), dtype=torch.int32)
    weights_SJ, nodes_SJ = a_SK.new_zeros(len(a_SK), MAX_NODES), a_SK.new_ones(len(a_SK), MAX_NODES)
    low_S1, high_S1 = _extent(a_SK, c_SK)
    try_S = 1 + torch.bucketize((high_S1 / low_S1)[:, 0], _ENOUGH_UP_TO)
    probes_SR, true_SR = _probes(a_SK, c_SK)
    for num_nodes in range(1, MAX_NODES + 1):
        now_Q = (try_S == num_nodes).nonzero().flatten()
        if not len(now_Q):
            continue
        weights_QJ, nodes_QJ = gauss_rules(a_SK[now_Q], c_SK[now_Q], num_nodes)
        if num_nodes < MAX_NODES:
            good_Q = _error_at_probes(probes_SR[now_Q], true_SR[now_Q], weights_QJ, nodes_QJ) <= tolerance
            try_S[now_Q[~good_Q]] += 1
            now_Q, weights_QJ, nodes_QJ = now_Q[good_Q], weights_QJ[good_Q], nodes_QJ[good_Q]
        num_nodes_S[now_Q] = num_nodes
        weights_SJ[now_Q, :num_nodes] = weights_QJ
        nodes_SJ[now_Q, :num_nodes] = nodes_QJ
    return num_nodes_S, weights_SJ, nodes_SJ


@lru_cache
def check_betas(beta1: float, beta2: float) -> None:
    """Raise ValueError where no rule of `MAX_NODES` nodes is good enough for rows that were long left alone.

    So it is where terms shrink slowly (beta1^2 near beta2 or above) while beta2^k changes much.
    """
    if beta1 * beta1 < beta2 and _worst_error(beta1, beta2) <= _WORST_TOLERATED:
        return
    raise ValueError(
        f"betas = ({beta1}, {beta2}): rows cannot catch up accurately when momentum outlasts the second moment: "
        "raise beta2, lower beta1, or pass lazy=True"
    )


def _worst_error(beta1: float, beta2: float) -> float:
    """Error of the largest rule where a row, trained for some steps, was left alone until it came to rest."""
    horizon = missed_steps_that_matter(beta1, beta2)
    start = 100
    rates = torch.ones(horizon, dtype=torch.float64)
    history = RateHistory(start, rates, torch.zeros(horizon + 1, dtype=torch.float64))
    a_SK, c_SK = missed_steps(history, torch.tensor([start]), beta1, beta2)
    weights_SJ, nodes_SJ = gauss_rules(a_SK, c_SK, MAX_NODES)
    return rule_error(a_SK, c_SK, weights_SJ, nodes_SJ).item()
