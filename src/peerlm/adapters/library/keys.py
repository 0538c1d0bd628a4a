"""Keys of adapters: where in the space of a base model's hidden states each one's texts lie.

Texts of one adapter are taken to be spread normally about its key, all adapters' with one covariance C. An adapter's
log-probability, given a query, is then -|C^(-1/2) (query - key)|^2 / (2 temperature) up to a constant (linear
discriminant analysis). C is estimated from all texts that adapters were added with, shrunk towards its mean variance.
Shape suffixes: A adapters, D size of a hidden state, S texts.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_CHECK_EVERY = 5
"""Steps of a fit between looks at what is held out."""
_TEMPERATURES = tuple(2 ** (exponent / 4) for exponent in range(-8, 29))


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of all adapters, and the texts' spread about them; a value, never changed in place."""

    names: tuple[str, ...]
    keys: Tensor
    """(A, D) float32, in the space of hidden states."""
    scatter: Tensor
    """(D, D) float64: sum over texts of (feature - mean of its adapter)(...)^T."""
    degrees: int
    """Texts in the scatter less the adapters that they belong to."""
    temperature: float = 1.0

    @classmethod
    def empty(cls, dim: int) -> "Keys":
        """No adapters yet, of hidden states (dim,)."""
        return cls(names=(), keys=torch.empty(0, dim), scatter=torch.zeros(dim, dim, dtype=torch.float64), degrees=0)

    def with_adapter(self, name: str, key: Tensor, features_SD: Tensor | None = None) -> "Keys":
        """One more adapter; with the features of its texts they enter the covariance."""
        scatter, degrees = self.scatter, self.degrees
        if features_SD is not None and len(features_SD) > 1:
            centred = features_SD.double() - features_SD.double().mean(dim=0)
            scatter, degrees = scatter + centred.T @ centred, degrees + len(features_SD) - 1
        keys = torch.cat([self.keys, key.float()[None]])
        return replace(self, names=(*self.names, name), keys=keys, scatter=scatter, degrees=degrees)

    def without(self, name: str) -> "Keys":
        """One adapter fewer; what its texts said of the covariance stays."""
        kept = [index for index, other in enumerate(self.names) if other != name]
        return replace(self, names=tuple(self.names[index] for index in kept), keys=self.keys[kept])

    def whitening(self) -> Tensor:
        """C^(-1/2), (D, D) float32; the identity where no adapter had two texts.

        The shrinkage D / (D + degrees) gives as much weight to the mean variance as to D texts.
        """
        dim = len(self.scatter)
        if self.degrees == 0:
            return torch.eye(dim)
        covariance = self.scatter / self.degrees
        share = dim / (dim + self.degrees)
        variance = covariance.diagonal().mean().clamp_min(1e-12)
        covariance = (1 - share) * covariance + share * variance * torch.eye(dim, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        return (vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T).float()

    def scorer(self) -> "Scorer":
        """What gives queries their scores."""
        whitening_DD = self.whitening()
        centre_D = self.keys.mean(dim=0) if len(self.keys) else torch.zeros(len(self.scatter))
        keys_AD = (self.keys - centre_D) @ whitening_DD
        return Scorer(centre=centre_D, whitening=whitening_DD, keys=keys_AD, temperature=self.temperature)

    def fitted(
        self, features_SD: Tensor, labels_S: Tensor, held_out_S: Tensor, *, steps: int, learning_rate: float
    ) -> "Keys":
        """Keys and temperature that make the right adapters of texts most probable.

        Keys begin as the means of the texts that are not held out, and move by Adam on the cross-entropy of these. Of
        all steps the one is kept whose keys, at their best temperature, are best on the texts held out.

        Args:
            features_SD: queries of texts.
            labels_S: int64, the index in `names` of each text's adapter.
            held_out_S: bool, some but not all of an adapter's texts.
            steps: gradient steps, over all texts each.
            learning_rate: of Adam, in units of the spread of texts about their key.
        """
        seen = ~held_out_S
        counts_A = torch.zeros(len(self.names)).index_add(0, labels_S[seen], torch.ones(int(seen.sum())))
        sums_AD = torch.zeros_like(self.keys).index_add(0, labels_S[seen], features_SD[seen].float())
        known_A1 = (counts_A > 0)[:, None]
        start = replace(self, keys=torch.where(known_A1, sums_AD / counts_A.clamp_min(1)[:, None], self.keys))
        scorer = start.scorer()
        queries = (features_SD.float() - scorer.centre) @ scorer.whitening
        keys = scorer.keys.clone().requires_grad_()
        best_loss, best_keys, temperature = math.inf, scorer.keys, 1.0
        optimizer = torch.optim.Adam([keys], lr=learning_rate)
        for step in range(steps + 1):
            if step % _CHECK_EVERY == 0 or step == steps:
                with torch.no_grad():
                    loss, found = _best_temperature(_scores(queries[held_out_S], keys, 1.0), labels_S[held_out_S])
                if loss < best_loss:
                    best_loss, best_keys, temperature = loss, keys.detach().clone(), found
            optimizer.zero_grad()
            F.cross_entropy(_scores(queries[seen], keys, temperature), labels_S[seen]).backward()
            optimizer.step()
        moved = (best_keys - scorer.keys) @ torch.linalg.inv(scorer.whitening)
        return replace(start, keys=start.keys + moved, temperature=temperature)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Whitened keys, ready to be compared with queries."""

    centre: Tensor
    """(D,): distances between small vectors round less."""
    whitening: Tensor
    """(D, D)."""
    keys: Tensor
    """(A, D): whitened, from the centre."""
    temperature: float

    def __call__(self, queries: Tensor) -> Tensor:
        """Log-probabilities of adapters up to a constant per query: (..., D) of any float dtype -> (..., A) float32."""
        flat_SD = (queries.flatten(0, -2).float() - self.centre) @ self.whitening
        return _scores(flat_SD, self.keys, self.temperature).view(*queries.shape[:-1], -1)

    def to(self, device: torch.device) -> "Scorer":
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("centre", "whitening", "keys")}
        return replace(self, **tensors)


def _best_temperature(scores_SA: Tensor, labels_S: Tensor) -> tuple[float, float]:
    """The least cross-entropy of scores over any of a range of temperatures, and that temperature."""
    return min((F.cross_entropy(scores_SA / t, labels_S).item(), t) for t in _TEMPERATURES)


def _scores(queries_SD: Tensor, keys_AD: Tensor, temperature: float | Tensor) -> Tensor:
    products = queries_SD @ keys_AD.T
    squares = queries_SD.square().sum(dim=1, keepdim=True) + keys_AD.square().sum(dim=1)
    return (products - squares / 2) / temperature
