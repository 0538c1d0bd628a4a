"""The next token of each row of logits, by that row's parameters and its own random numbers.

Shape suffixes: B rows, V tokens of the vocabulary, K candidates.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peerlm.errors import UserError
from peerlm.serve.request import SamplingParams, TokenLogprob

FIRST_CANDIDATES = 1024
"""So many likeliest tokens are sorted first; all are where these are not probable enough for top_p."""

NOT_FINITE = "the model's logits are not finite numbers for this text; check its weights, its packs and its adapters"
ALL_FORBIDDEN = "min_tokens and logit_bias forbid every token that the model knows; allow one"


class Sampler:
    """How one sequence chooses its tokens, and what it has chosen so far.

    Args:
        params: of the request.
        prompt: its token ids.
        ends: all tokens that end the text, which min_tokens forbids at first.
        vocab_size: V.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], ends: frozenset[int], vocab_size: int):
        self.params = params
        self.written: Counter[int] = Counter()
        self._ends = [token for token in sorted(ends) if token < vocab_size]
        self._read = set(prompt) if params.repetition_penalty != 1 else set()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature and the cuts applies at the next token."""
        params = self.params
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
            or self.written.total() < params.min_tokens
        )

    def changed(self, logits_V: Tensor) -> Tensor:
        """Logits with penalties and biases."""
        params, logits_V = self.params, logits_V.clone()
        if params.repetition_penalty != 1:
            seen = _ids(self._read | set(self.written), logits_V)
            found = logits_V[seen]
            logits_V[seen] = torch.where(
                found > 0, found / params.repetition_penalty, found * params.repetition_penalty
            )
        if self.written and (params.presence_penalty or params.frequency_penalty):
            counts = torch.tensor(list(self.written.values()), device=logits_V.device, dtype=logits_V.dtype)
            logits_V[_ids(self.written, logits_V)] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias.items():
            logits_V[token] += bias
        if self.written.total() < params.min_tokens and self._ends:
            logits_V[_ids(self._ends, logits_V)] = -torch.inf
        return logits_V

    def draw(self, logits_V: Tensor) -> int:
        """A token at random, by temperature, top_k, top_p and min_p."""
        params = self.params
        scaled_V = (logits_V.double() - logits_V.max()) / params.temperature
        place = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        if not params.top_k and params.top_p == 1 and not params.min_p:
            return _drawn(scaled_V.softmax(dim=0), place)
        wanted = params.top_k or len(scaled_V)
        candidates = min(wanted, len(scaled_V), FIRST_CANDIDATES)
        while True:
            scaled_K, ids_K = scaled_V.topk(candidates)
            if candidates == min(wanted, len(scaled_V)):
                probability_K = scaled_K.softmax(dim=0)
                break
            probability_K = (scaled_K - scaled_V.logsumexp(dim=0)).exp()
            if not params.top_k and probability_K.sum() >= params.top_p and params.top_p < 1:
                break
            if params.top_p == 1 and probability_K[-1] < params.min_p * probability_K[0]:
                break
            candidates = min(wanted, len(scaled_V))
        keep_K = probability_K.cumsum(dim=0) - probability_K < params.top_p
        keep_K &= probability_K >= params.min_p * probability_K[0]
        return int(ids_K[_drawn(probability_K * keep_K, place)])


@dataclass(frozen=True)
class Chosen:
    """A token, and its log-probability where that is asked for."""

    token_id: int
    logprob: TokenLogprob | None


def choose(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[Chosen | Exception]:
    """The next token of each row, or why it has none: its logits have no finite maximum.

    A row's result depends on its logits and its sampler alone.

    Args:
        logits_BV: of any floating dtype, on any device.
        samplers: one for each row; what they chose is counted in them.
    """
    logits_BV = logits_BV.float()
    best_B, argmax_B = logits_BV.max(dim=-1)
    usable, likeliest = best_B.isfinite().tolist(), argmax_B.tolist()
    found: list[Chosen | Exception] = []
    for row, sampler in enumerate(samplers):
        try:
            found.append(_choose_one(logits_BV[row], sampler, likeliest[row] if usable[row] else None))
        except Exception as error:  # of this row alone
            found.append(error)
    return found


def _choose_one(logits_V: Tensor, sampler: Sampler, likeliest: int | None) -> Chosen:
    if likeliest is None:
        raise UserError(NOT_FINITE)
    token, params = likeliest, sampler.params
    if params.temperature or sampler.changes_logits:
        changed_V = sampler.changed(logits_V) if sampler.changes_logits else logits_V
        if not changed_V.max().isfinite():
            raise UserError(ALL_FORBIDDEN)
        token = sampler.draw(changed_V) if params.temperature else int(changed_V.argmax())
    sampler.written[token] += 1
    logprob = None
    if params.logprobs is not None:
        (logprob,) = logprobs_of(logits_V[None], [token], params.logprobs)
    return Chosen(token, logprob)


def logprobs_of(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of tokens under rows of logits, and of the `top` likeliest ones."""
    found = []
    for begin in range(0, len(tokens), 64):  # a wide vocabulary at every position would be large
        some = tokens[begin : begin + 64]
        logprobs_TV = logits_TV[begin : begin + 64].float().log_softmax(dim=-1)
        own = logprobs_TV.gather(-1, torch.tensor(some, device=logits_TV.device)[:, None])[:, 0].tolist()
        values_TK, ids_TK = logprobs_TV.topk(min(top, logprobs_TV.shape[-1]), dim=-1)
        for token, logprob, ids, values in zip(some, own, ids_TK.tolist(), values_TK.tolist(), strict=True):
            found.append(TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True))))
    return found


def _drawn(weights_K: Tensor, place: float) -> int:
    """The index at which a share `place` of all weight is reached; never one of weight 0."""
    sums_K = weights_K.cumsum(dim=0)
    found = int(torch.searchsorted(sums_K, sums_K[-1] * place, right=True))
    return min(found, int(weights_K.nonzero()[-1]))


def _ids(tokens: Sequence[int] | set[int] | Counter[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)
