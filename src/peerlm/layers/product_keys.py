"""The learned index: queries against product keys, giving each token its experts and their weights."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.layers.one_call import where
from peerlm.layers.query_norm import QueryBatchNorm
from peerlm.ops import api
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.tensors import has_values, number_in

_KEY_LENGTH = 3**-0.5
"""Root mean square of a sub-key's length at the start."""

QUERY_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda heads, key_dim: QueryBatchNorm(heads * key_dim),
    "layer": lambda heads, key_dim: nn.LayerNorm(key_dim),
    "none": lambda heads, key_dim: nn.Identity(),
}


def sub_keys_per_half(
    num_rows: int, per_head: int, *, names: tuple[str, str] = ("num_experts", "experts_per_head")
) -> int:
    """Sub-keys per half, n = sqrt(num_rows), of an index that retrieves `per_head` of its n * n rows.

    Raises:
        ValueError: `num_rows` is no square, or `per_head` is not in 1 .. n; the message uses `names`.
    """
    rows_name, per_head_name = names
    check_sizes(**{rows_name: num_rows, per_head_name: per_head})
    n = math.isqrt(num_rows)
    if n * n != num_rows:
        nearest = round(math.sqrt(num_rows)) ** 2
        raise ValueError(
            f"{rows_name} is {num_rows}, which is not a square number; product keys index n * n rows: "
            f"the nearest is {nearest}"
        )
    if per_head > n:
        raise ValueError(
            f"{per_head_name} is {per_head}, more than the {n} sub-keys per half of {rows_name} = "
            f"{num_rows}; take {per_head_name} <= {n} or {rows_name} >= {per_head**2}"
        )
    return n


class QueryMap(nn.Linear):
    """A linear layer without bias, multiplied by a backend."""

    def __init__(self, dim: int, features: int, backend: str):
        super().__init__(dim, features, bias=False)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """(..., dim) -> (..., features)."""
        y_TF = api.linear(input.reshape(-1, self.in_features), self.weight, backend=self.backend)
        return y_TF.view(*input.shape[:-1], self.out_features)


class ProductKeys(nn.Module):
    """Retrieve the `experts_per_head` best of `num_experts` experts for every token and head.

    The score of expert (i, j) is q[:key_dim / 2] . c_i + q[key_dim / 2:] . c'_j with n = sqrt(num_experts), so that
    2 n sub-keys index n * n experts, exactly (He 2024, section 2; Lample 2019, section 3.1).

    Args:
        dim: width of the input.
        num_experts: N, a square number.
        heads: independent queries per token, H.
        experts_per_head: k <= sqrt(num_experts).
        key_dim: size of a query, even.
        shared_keys: one set of sub-keys for all heads (He 2024's text), or one per head (Lample 2019).
        query_norm: "batch" over the H * key_dim features, "layer" over each head's key_dim, or "none".
        key_norm: normalise sub-keys to one length, sqrt(1/3), about that of the start. Otherwise a short sub-key is
            never retrieved and never recovers.
        weighting: "softmax" over a head's k scores, "sigmoid", "relu", or "none" (the raw score).
        pairing: the id of expert (i, j): "row-major", i * n + j, or "shells", in which more sub-keys only append ids.
        grown_from: how many experts there were before the last growth, while those that it added are being opened
            (`peerlm.growth.grow`); None for a layer like any other.
        backend: a name in `peerlm.ops.api.BACKENDS`.

    Attributes:
        sub_keys: (2, H or 1, n, key_dim / 2).
        opening: None unless `grown_from` is given. Then a buffer of one number in 0 .. 1, the prior of a new sub-key:
            its logarithm is added to the half scores. So softmax weights are multiplied by it, once for each new half
            of an expert. At 0, where it starts, new sub-keys are left out.

    Raises:
        ValueError: a setting is impossible; the message has the setting, its value, and the fix.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"sub_keys": "keys"}
    opening: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        heads: int,
        experts_per_head: int,
        key_dim: int,
        shared_keys: bool = True,
        query_norm: str = "batch",
        key_norm: bool = False,
        weighting: str = "softmax",
        pairing: str = "row-major",
        grown_from: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        api.check_backend(backend)
        api.check_pairing(pairing)
        check_sizes(dim=dim, heads=heads, key_dim=key_dim)
        n = sub_keys_per_half(num_experts, experts_per_head)
        if key_dim % 2:
            raise ValueError(f"key_dim is {key_dim}; it is split into two halves, so take an even number of at least 2")
        for name, value, choices in (
            ("query_norm", query_norm, QUERY_NORMS),
            ("weighting", weighting, WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if grown_from is not None:
            check_growth(grown_from, num_experts, experts_per_head, pairing)
        self.dim = dim
        self.num_experts = num_experts
        self.heads = heads
        self.experts_per_head = experts_per_head
        self.key_dim = key_dim
        self.key_norm = key_norm
        self.weighting = weighting
        self.pairing = pairing
        self.grown_from = grown_from
        self.backend = backend
        self.query_proj = QueryMap(dim, heads * key_dim, backend)
        self.query_norm = QUERY_NORMS[query_norm](heads, key_dim)
        self.shared_keys = shared_keys
        self.sub_keys = nn.Parameter(torch.empty(2, 1 if shared_keys else heads, n, key_dim // 2))
        self.register_buffer("opening", None if grown_from is None else torch.zeros(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries of unit variance for such inputs; sub-keys as Lample 2019: half scores of variance 1/3."""
        nn.init.normal_(self.query_proj.weight, std=self.dim**-0.5)
        bound = (self.key_dim // 2) ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)
        if isinstance(self.query_norm, (QueryBatchNorm, nn.LayerNorm)):
            self.query_norm.reset_parameters()

    def query(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised queries (..., heads, key_dim) of x (..., dim); `mask` (...) is True at real tokens."""
        return self._query(x, mask).reshape(*x.shape[:-1], self.heads, self.key_dim)

    def _query(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalised queries (T, heads, key_dim) of x (..., dim)."""
        _, mask_T = flatten_tokens(x, mask, self.dim)
        # Who has put something in the map's place, as LoRA does, may have to know which row of a batch a token is in.
        features_TF = self.query_proj(x).reshape(-1, self.heads * self.key_dim)
        if isinstance(self.query_norm, QueryBatchNorm):
            return self.query_norm(features_TF, mask_T).unflatten(-1, (self.heads, self.key_dim))
        return self.query_norm(features_TF.unflatten(-1, (self.heads, self.key_dim)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights (float32 at least) and expert ids (int64): (..., heads, experts_per_head), best first."""
        weights, expert_ids = self.search(self._query(x, mask))
        shape = (*x.shape[:-1], self.heads, self.experts_per_head)
        return weights.reshape(shape), expert_ids.reshape(shape)

    def compared(self, sub_keys: Tensor) -> Tensor:
        """Sub-keys (..., C) as queries meet them: of one length with `key_norm`, otherwise as they are."""
        if not self.key_norm:
            return sub_keys
        return F.normalize(sub_keys.to(torch.promote_types(sub_keys.dtype, torch.float32)), dim=-1) * _KEY_LENGTH

    def open_keys(self, query_THX: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (T, heads, 2 C) and sub-keys (2, heads or 1, n, C) as they are compared, the opening counted in."""
        sub_keys = self.compared(self.sub_keys)
        if self.opening is not None and self.grown_from is not None:
            old = math.isqrt(self.grown_from)
            if torch.compiler.is_compiling():
                return _partly_open(query_THX, sub_keys, old, self.opening.item())
            return _partly_open(query_THX, sub_keys, old, number_in(self.opening))
        return query_THX, sub_keys

    def one_call(self) -> tuple[tuple[object, ...], tuple[nn.Module, ...]] | None:
        """What `of_one_call` depends on, and the modules that it stands for; None where others have put in theirs."""
        modules: dict[str, Any] = self._modules  # read here without nn.Module's own look-up, which takes longer
        query_proj, norm = modules["query_proj"], modules["query_norm"]
        if type(query_proj) is not QueryMap or type(norm) not in (QueryBatchNorm, nn.LayerNorm, nn.Identity):
            return None
        sub_keys = self._parameters.get("sub_keys")
        if sub_keys is None or self._buffers["opening"] is not None:
            return None
        query_map = query_proj._parameters["weight"]
        tensors = [sub_keys, query_map, *norm._parameters.values(), *norm._buffers.values()]
        settings = self.experts_per_head, self.weighting, self.pairing, self.key_norm
        return (*settings, *where(tensors), sub_keys.shape), (self, query_proj, norm)

    def of_one_call(self) -> dict[str, Any]:
        """The fields of `ops.whole_layer.WholeLayer` that are of the index."""
        norm = self.query_norm
        norms: list[Tensor] = [norm.weight, norm.bias] if isinstance(norm, (QueryBatchNorm, nn.LayerNorm)) else []
        if isinstance(norm, QueryBatchNorm):
            norms = [norm.running_mean, norm.running_var, *norms]
        return {
            "query_map": self.query_proj.weight,
            "norm": ("none", "", "layer", "", "batch")[len(norms)],
            "norms": norms,
            "epsilon": getattr(norm, "eps", 0.0),
            "sub_keys": self.sub_keys,
            "key_length": _KEY_LENGTH if self.key_norm else 0.0,
            "k": self.experts_per_head,
            "weighting": self.weighting,
            "pairing": self.pairing,
        }

    def search(self, query_THX: Tensor, weighting: str | None = None) -> tuple[Tensor, Tensor]:
        """Weights and ids (T, heads, experts_per_head) of normalised queries, by another weighting if one is given."""
        query_THX, sub_keys = self.open_keys(query_THX)
        return api.retrieve(
            query_THX,
            sub_keys,
            self.experts_per_head,
            weighting=weighting or self.weighting,
            pairing=self.pairing,
            backend=self.backend,
        )

    @torch.no_grad()
    def initial_weight_power(self) -> float:
        """Mean over tokens of the sum of squared weights of all heads, for queries of unit variance.

        It sets the scale of what is retrieved: a sum of independent vectors of variance s^2 with these weights has
        variance s^2 times this. Measured with 512 fixed standard normal queries on the present sub-keys; 1 where
        these have no values, as on the meta device.
        """
        if not has_values(self.sub_keys):
            return 1.0
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(512, self.heads, self.key_dim, generator=generator, device="cpu").to(self.sub_keys)
        weights, _ = self.search(query)
        return weights.square().sum(dim=(-2, -1)).mean().item()

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of scoring each head's query against 2 n sub-keys; the query map counts itself."""
        return 2 * self.heads * self.sub_keys.shape[2] * self.key_dim

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return (
            f"num_experts={self.num_experts}, heads={self.heads}, experts_per_head={self.experts_per_head}, "
            f"key_dim={self.key_dim}, shared_keys={self.shared_keys}, key_norm={self.key_norm}, "
            f"weighting={self.weighting!r}, pairing={self.pairing!r}, grown_from={self.grown_from}"
        )


def check_growth(old: int, new: int, experts_per_head: int, pairing: str) -> None:
    """Raise a ValueError where a layer of `new` experts cannot have grown from one of `old`."""
    sub_keys_per_half(old, experts_per_head, names=("grown_from", "experts_per_head"))
    if old >= new:
        raise ValueError(f"grown_from is {old}, but there are {new} experts; a layer grows to more than it had")
    if pairing != "shells":
        raise ValueError(f"pairing is {pairing!r}, in which growth would move experts; take pairing='shells'")


def _partly_open(query_THX: Tensor, sub_keys_2HnC: Tensor, old: int, opening: float) -> tuple[Tensor, Tensor]:
    """Queries and sub-keys whose scores count all but the first `old` sub-keys of each half at the prior `opening`.

    Between 0 and 1 each half has one feature more: the query's is 1, the sub-key's what is added to its score.
    """
    if opening <= 0:
        return query_THX, sub_keys_2HnC[:, :, :old].contiguous()  # the bits of products may depend on strides
    if opening >= 1:
        return query_THX, sub_keys_2HnC
    query_TH2C = query_THX.to(torch.promote_types(query_THX.dtype, torch.float32)).unflatten(-1, (2, -1))
    sub_keys = sub_keys_2HnC.to(torch.promote_types(sub_keys_2HnC.dtype, torch.float32))
    prior = sub_keys.new_zeros(*sub_keys.shape[:-1], 1)
    prior[:, :, old:] = math.log(opening)
    query = torch.cat([query_TH2C, torch.ones_like(query_TH2C[..., :1])], dim=-1).flatten(-2)
    return query, torch.cat([sub_keys, prior], dim=-1)
