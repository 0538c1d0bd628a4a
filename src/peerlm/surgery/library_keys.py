"""Keys of adapters: where in the space of a base model's hidden states each one's texts lie.

Texts of one adapter are taken to be spread normally about its key, all adapters' with one covariance C. An adapter's
log-probability, given a query, is then -|C^(-1/2) (query - key)|^2 / (2 temperature) up to a constant (linear
discriminant analysis). C is estimated from all texts that adapters were added with, shrunk towards its mean variance.
Shape suffixes: A adapters, D size of a hidden state, S texts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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

    def fitted(self, features_SD: Tensor, labels_S: Tensor, *, steps: int, learning_rate: float) -> "Keys":
        """Keys and temperature that make the right adapters of texts most probable (softmax regression by Adam).

        Args:
            features_SD: queries of the texts.
            labels_S: int64, the index in `names` of each text's adapter.
            steps: gradient steps, over all texts each.
            learning_rate: of Adam, in units of the spread of texts about their key.
        """
        scorer = self.scorer()
        queries = (features_SD.float() - scorer.centre) @ scorer.whitening
        keys = scorer.keys.clone().requires_grad_()
        log_temperature = torch.tensor(float(self.temperature)).log().requires_grad_()
        optimizer = torch.optim.Adam([keys, log_temperature], lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            scores = _scores(queries, keys, log_temperature.exp())
            torch.nn.functional.cross_entropy(scores, labels_S).backward()
            optimizer.step()
        moved = (keys.detach() - scorer.keys) @ torch.linalg.inv(scorer.whitening)
        return replace(self, keys=self.keys + moved, temperature=log_temperature.exp().item())


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


def _scores(queries_SD: Tensor, keys_AD: Tensor, temperature: float | Tensor) -> Tensor:
    products = queries_SD @ keys_AD.T
    squares = queries_SD.square().sum(dim=1, keepdim=True) + keys_AD.square().sum(dim=1)
    return (products - squares / 2) / temperature
