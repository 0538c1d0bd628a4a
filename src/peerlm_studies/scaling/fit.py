"""A law of loss over size, tokens, granularity and expansion, and its fit to measured runs.

    L(N, D, G, E) = c + (g / G^gamma + a) / (N^alpha E^epsilon) + b / D^beta

With epsilon = 0 and N all parameters this is Krajewski 2024's law (arXiv 2402.07871, equation 7); with g = 0 too,
Hoffmann 2022's. For PEER N is what a token touches, and E how many experts there are for each that it touches: what
the index costs is in the FLOPs, as the accounting counts them, not in the law.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]
HUBER = 0.1
"""Where the loss of residuals of ln(L) turns from squares to absolute values, as Krajewski 2024."""
LARGEST_EXPONENT = 3.0


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """One measured run, as the law sees it."""

    size: float
    """N, parameters without embeddings."""
    tokens: float
    """D."""
    granularity: float = 1.0
    """G, experts that a token touches."""
    expansion: float = 1.0
    """E, experts over G."""
    loss: float
    """Nats per token."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """The constants; g = 0 where granularity was not varied, epsilon = 0 where expansion was not."""

    c: float
    a: float
    alpha: float
    b: float
    beta: float
    g: float = 0.0
    gamma: float = 0.0
    epsilon: float = 0.0

    def loss(self, *, size: float, tokens: float, granularity: float = 1.0, expansion: float = 1.0) -> float:
        """The loss that the law expects."""
        of_size = (self.g / granularity**self.gamma + self.a) / (size**self.alpha * expansion**self.epsilon)
        return self.c + of_size + self.b / tokens**self.beta


def varied(points: Sequence[RunPoint]) -> tuple[bool, bool]:
    """Whether granularity, and whether expansion, is different in at least three ways: what a fit needs of it."""
    return len({point.granularity for point in points}) > 2, len({point.expansion for point in points}) > 2


def constants(points: Sequence[RunPoint]) -> int:
    """How many constants a fit to these points has."""
    granularity, expansion = varied(points)
    return 5 + 2 * granularity + expansion


def fit_law(points: Sequence[RunPoint], *, starts: int = 60, seed: int = 0) -> Law:
    """Least Huber loss of ln(L), by BFGS from many starts.

    Args:
        points: at least as many as `constants` says.
        starts: drawn from wide ranges.
        seed: of the starts.

    Raises:
        ValueError: too few points, or one that is not positive.
    """
    if len(points) < constants(points):
        raise ValueError(f"{len(points)} runs are too few to fit {constants(points)} constants; make more")
    if min(min(asdict(point).values()) for point in points) <= 0:
        raise ValueError("a run has a size, tokens, granularity, expansion or loss of 0 or less; leave it out")
    problem = _Problem(points)
    generator = np.random.default_rng(seed)
    return problem.law(min((problem.descend(problem.start(generator)) for _ in range(starts)), key=problem.value))


def bootstrap(points: Sequence[RunPoint], law: Law, *, times: int = 200, seed: int = 0) -> list[Law]:
    """Fits to runs drawn with replacement, each from the whole fit and three other starts.

    A draw of too few different runs is drawn again.

    Raises:
        ValueError: the runs themselves are too few different ones.
    """
    generator = np.random.default_rng(seed)
    needed = constants(points)
    if len(set(points)) < needed:
        raise ValueError(f"{len(set(points))} different runs are too few to fit {needed} constants; make more")
    laws: list[Law] = []
    while len(laws) < times:
        drawn = [points[index] for index in generator.integers(len(points), size=len(points))]
        if len(set(drawn)) < needed:
            continue
        problem = _Problem(drawn, like=points)
        starts = [problem.of_law(law), *(problem.start(generator) for _ in range(3))]
        laws.append(problem.law(min(map(problem.descend, starts), key=problem.value)))
    return laws


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


class _Problem:
    """The loss of a fit over unbounded variables.

    They are logarithms of c, of the terms of size and tokens at the mean run, and of g over a there; exponents are
    squeezed into 0 .. 3, but for epsilon, which may have either sign.
    """

    def __init__(self, points: Sequence[RunPoint], like: Sequence[RunPoint] | None = None) -> None:
        self.with_g, self.with_epsilon = varied(like or points)
        whole = like or points
        names = ("size", "tokens", "granularity", "expansion", "loss")
        logs = {name: np.log([getattr(point, name) for point in points]) for name in names}
        self.centre = {name: float(np.mean(np.log([getattr(point, name) for point in whole]))) for name in names[:4]}
        self.size, self.tokens, self.granularity, self.expansion = (
            logs[name] - self.centre[name] for name in names[:4]
        )
        self.loss = logs["loss"]

    def start(self, generator: np.random.Generator) -> Floats:
        """Terms that add up to about the mean loss, exponents of all kinds."""
        shares = generator.dirichlet([1.0, 1.0, 1.0]) + 1e-3
        logs = np.log(shares * np.exp(self.loss.mean()))
        exponents = [_unsqueezed(value) for value in generator.uniform(0.05, 1.5, size=3)]
        log_g, epsilon = generator.normal(), generator.uniform(-0.1, 0.3)
        return np.array([logs[0], logs[1], exponents[0], logs[2], exponents[1], log_g, exponents[2], epsilon])

    def descend(self, start: Floats) -> Floats:
        """A local minimum."""
        found = minimize(lambda x: self.value_and_slope(x), start, jac=True, method="BFGS", options={"maxiter": 500})
        return np.asarray(found.x) if np.isfinite(found.fun) else start

    def value(self, x: Floats) -> float:
        """The sum over runs of the Huber loss."""
        return self.value_and_slope(x)[0]

    def value_and_slope(self, x: Floats) -> tuple[float, Floats]:
        """The sum over runs of the Huber loss, and its derivatives."""
        x = np.clip(x, -50, 50)
        alpha, beta, gamma = (LARGEST_EXPONENT / (1 + np.exp(-x[index])) for index in (2, 4, 6))
        share = np.zeros_like(self.loss)  # of g in the factor of the term of size
        factor = np.zeros_like(self.loss)
        if self.with_g:
            of_g = x[5] - gamma * self.granularity
            factor = np.logaddexp(0.0, of_g)
            share = 1 / (1 + np.exp(-of_g))
        epsilon = x[7] if self.with_epsilon else 0.0
        of_size = np.exp(np.minimum(x[1] + factor - alpha * self.size - epsilon * self.expansion, 50))
        of_tokens = np.exp(np.minimum(x[3] - beta * self.tokens, 50))
        of_c = np.exp(x[0])
        total = of_c + of_size + of_tokens
        residual = np.log(total) - self.loss
        small = np.abs(residual) <= HUBER
        value = np.where(small, residual**2 / 2, HUBER * (np.abs(residual) - HUBER / 2)).sum()
        pull = np.where(small, residual, HUBER * np.sign(residual)) / total
        slope = np.zeros(8)
        slope[0] = (pull * of_c).sum()
        slope[1] = (pull * of_size).sum()
        slope[2] = (pull * of_size * -self.size).sum() * _squeezed_slope(alpha)
        slope[3] = (pull * of_tokens).sum()
        slope[4] = (pull * of_tokens * -self.tokens).sum() * _squeezed_slope(beta)
        if self.with_g:
            slope[5] = (pull * of_size * share).sum()
            slope[6] = (pull * of_size * share * -self.granularity).sum() * _squeezed_slope(gamma)
        if self.with_epsilon:
            slope[7] = (pull * of_size * -self.expansion).sum()
        return float(value), slope

    def law(self, x: Floats) -> Law:
        """The constants that the variables stand for."""
        x = np.clip(x, -50, 50)
        alpha, beta, gamma = (LARGEST_EXPONENT / (1 + math.exp(-x[index])) for index in (2, 4, 6))
        epsilon = float(x[7]) if self.with_epsilon else 0.0
        log_a = x[1] + alpha * self.centre["size"] + epsilon * self.centre["expansion"]
        return Law(
            c=math.exp(x[0]),
            a=math.exp(log_a),
            alpha=alpha,
            b=math.exp(x[3] + beta * self.centre["tokens"]),
            beta=beta,
            g=math.exp(log_a + x[5] + gamma * self.centre["granularity"]) if self.with_g else 0.0,
            gamma=gamma if self.with_g else 0.0,
            epsilon=epsilon,
        )

    def of_law(self, law: Law) -> Floats:
        """The variables that stand for these constants."""
        log_a = math.log(law.a) - law.alpha * self.centre["size"] - law.epsilon * self.centre["expansion"]
        log_b = math.log(law.b) - law.beta * self.centre["tokens"]
        log_g, gamma = 0.0, 0.5
        if self.with_g:
            log_g = math.log(law.g / law.a) - law.gamma * self.centre["granularity"]
            gamma = law.gamma
        exponents = [_unsqueezed(value) for value in (law.alpha, law.beta, gamma)]
        return np.array([math.log(law.c), log_a, exponents[0], log_b, exponents[1], log_g, exponents[2], law.epsilon])


def _unsqueezed(exponent: float) -> float:
    exponent = min(max(exponent, 1e-9), LARGEST_EXPONENT * (1 - 1e-9))
    return math.log(exponent / (LARGEST_EXPONENT - exponent))


def _squeezed_slope(exponent: float) -> float:
    return exponent * (1 - exponent / LARGEST_EXPONENT)


CONSTANTS = tuple(field.name for field in fields(Law))
"""Names of the constants, in order."""
