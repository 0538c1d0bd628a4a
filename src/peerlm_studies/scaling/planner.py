"""What to train for a budget: backbone, experts and tokens that a fitted law expects the least loss of."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from peerlm.accounting import Cost, model_cost
from peerlm.errors import UserError
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.model.configuration_peer import INNER, kinds_of_blocks
from peerlm_studies.memory import training_bytes
from peerlm_studies.scaling.fit import CONSTANTS, Law, interval
from peerlm_studies.scaling.points import SIZES, embedding_parameters, experts_of, kind_of

WIDTHS = tuple(dict.fromkeys(8 * round(4 * 2 ** (step / 4)) for step in range(17))) + tuple(
    dict.fromkeys(64 * round(8 * 2 ** (step / 4)) for step in range(1, 17))
)
"""Widths that are tried, about a fifth apart: 32 to 512 in steps of 8, to 8,192 in steps of 64."""
UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model for the budget, and what the law expects of it."""

    method: str
    loss: float
    """Expected, nats per token, of the text and tokenizer of the fit."""
    low: float
    """The middle 95% of the bootstrap's expectations: from here,"""
    high: float
    """to here."""
    hidden_size: int
    layers: int
    experts: int
    """In a layer; 0 for a dense one."""
    active_experts: int
    """Of these, that a token touches."""
    heads: int
    """Of the index; 0 where there is none."""
    total_parameters: int
    active_parameters: int
    tokens: int
    memory_gib: float
    warnings: tuple[str, ...]
    """In what it lies outside of the runs that the law was fitted to."""


def plan_model(
    law: Mapping[str, Any],
    *,
    flops: float,
    memory: float = math.inf,
    method: str | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
) -> list[Candidate]:
    """The best model of each method for a budget, that of least expected loss first.

    Widths are tried from 32 to 8,192, with a block for each 64 of width, at least four. Experts and heads are tried by
    powers of four and two where the law's runs varied them, and as far, for beyond that what the law says of them is a
    guess at its worst; all other settings are those of its largest run. FLOPs are the accounting's, so that what the
    index costs counts.

    Args:
        law: what `scaling` returns.
        flops: of training.
        memory: bytes for training (`training_bytes`, one window at a time).
        method: only this; None: all.
        vocab_size, context: of the model; None: of the fit, to whose text and tokens alone losses apply.

    Raises:
        UserError: a figure out of range, a method that the law lacks, or nothing fits.
    """
    for name, value in (("flops", flops), ("memory", memory)):
        if not value > 0 or (name == "flops" and math.isinf(value)):
            raise UserError(f"--{name} {value:g}: must be above 0")
    fits = law["methods"]
    if method is not None and method not in fits:
        raise UserError(f"the law has no method {method!r}: choose from {', '.join(fits)}")
    best = []
    for name in [method] if method is not None else fits:
        found = [
            candidate
            for model in _models(fits[name])
            if (candidate := _candidate(name, fits[name], model, flops, memory, vocab_size, context)) is not None
        ]
        if found:
            best.append(min(found, key=lambda candidate: candidate.loss))
    if not best:
        raise UserError(
            f"no model of at least 32 wide trains on one window for {flops:g} FLOPs in {memory / 2**30:.3g} GiB: "
            "allow more of either"
        )
    return sorted(best, key=lambda candidate: candidate.loss)


def _models(fit: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The [model] sections that are tried."""
    base = {name: value for name, value in fit["model"].items() if name not in ("intermediate_size", "head_dim")}
    kind = kind_of(base)
    for width in WIDTHS:
        named = base.get("ffw_layers")
        if isinstance(named, list):
            ways = (kind, kind + INNER, None)
            named = next((way for way in ways if named == kinds_of_blocks(way, len(named))), named)
        layers = len(named) if isinstance(named, list) else max(4, width // 64)
        heads = 4 if width <= 512 else width // 64
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        model = {**base, **sizes, "ffw_layers": named}
        model.pop("num_key_value_heads", None)
        if kind not in ("peer", "pkm"):
            yield model
            continue
        rows, index_heads, per_head = SIZES[kind]
        active, expansion = experts_of(base)
        settings = dict(base.get(kind) or {})
        k = settings.get(per_head, 16 if kind == "peer" else 32)
        numbers, choices = [round(active * expansion)], [round(active / k)]
        if fit["varied"]["expansion"]:
            low, high = fit["ranges"]["experts"]
            numbers = [4**power for power in range(2, 16) if low <= 4**power <= high]
        if fit["varied"]["granularity"]:
            low, high = fit["ranges"]["granularity"]
            choices = [2**power for power in range(10) if low <= k * 2**power <= high]
        least, most = fit["ranges"]["expansion"]
        for number in numbers:
            for heads in choices:
                if k * k <= number and least <= number / (heads * k) <= most:
                    yield {**model, kind: {**settings, rows: number, index_heads: heads, per_head: k}}


def _candidate(
    name: str,
    fit: Mapping[str, Any],
    model: Mapping[str, Any],
    flops: float,
    memory: float,
    vocab_size: int | None,
    context: int | None,
) -> Candidate | None:
    """What the law says of a model; None where the budget does not reach for a window, or memory for the model."""
    context = context or fit["context"]
    settings = {**model, "vocab_size": vocab_size or fit["vocab_size"], "max_position_embeddings": context}
    config = PeerConfig(**settings)
    cost = _cost(settings, context)
    tokens = int(flops / cost.training_flops_per_token)
    needed = training_bytes(cost.total_parameters, config, tokens=context)
    if tokens < context or needed > memory:
        return None
    granularity, expansion = experts_of(model)
    at = {
        "size": float(cost.active_parameters - embedding_parameters(settings, config.vocab_size)),
        "tokens": float(tokens),
        "granularity": granularity,
        "expansion": expansion,
    }
    expectations = [Law(**dict(zip(CONSTANTS, drawn, strict=True))).loss(**at) for drawn in fit["bootstrap"]]
    low, high = interval(expectations)
    kind = kind_of(model)
    return Candidate(
        method=name,
        loss=Law(**fit["constants"]).loss(**at),
        low=low,
        high=high,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        experts=0 if kind == "dense" else round(granularity * expansion),
        active_experts=0 if kind == "dense" else round(granularity),
        heads=model[kind][SIZES[kind][1]] if kind in ("peer", "pkm") else 0,
        total_parameters=cost.total_parameters,
        active_parameters=cost.active_parameters,
        tokens=tokens,
        memory_gib=needed / 2**30,
        warnings=tuple(_warnings({**at, "flops": flops}, {**fit["ranges"], "flops": fit["flops"]})),
    )


def _cost(settings: Mapping[str, Any], context: int) -> Cost:
    """Of a model, from models of one block and of two of each kind of feed-forward layer, since costs add up."""
    blocks = Counter(kinds_of_blocks(settings.get("ffw_layers"), settings["num_hidden_layers"]))
    of_kind = {
        kind: [_built_cost({**settings, "ffw_layers": kind, "num_hidden_layers": count}, context) for count in (1, 2)]
        for kind in blocks
    }
    any_one, any_two = next(iter(of_kind.values()))
    return Cost(
        **{
            field.name: 2 * getattr(any_one, field.name)
            - getattr(any_two, field.name)
            + sum(
                blocks[kind] * (getattr(two, field.name) - getattr(one, field.name))
                for kind, (one, two) in of_kind.items()
            )
            for field in fields(Cost)
        }
    )


def _built_cost(settings: Mapping[str, Any], context: int) -> Cost:
    return _cost_of_text(json.dumps(settings, sort_keys=True), context)


@functools.lru_cache(maxsize=4096)
def _cost_of_text(settings: str, context: int) -> Cost:
    """Of a model by its settings as JSON: the same ones are asked for again with every budget."""
    with torch.device("meta"):
        return model_cost(PeerForCausalLM(PeerConfig(**json.loads(settings))), context)


def _warnings(at: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> Iterator[str]:
    for name, value in at.items():
        low, high = ranges[name]
        if not 0.99 * low <= value <= 1.01 * high:
            yield f"{name} {value:.3g} is outside of what was fitted, {low:.3g} to {high:.3g}"


def read_bytes(text: str) -> float:
    """Bytes from a number with a unit, as in 80GiB or 500MB; raises UserError for anything else."""
    if text == "inf":
        return math.inf
    match = re.fullmatch(r"([0-9.eE+]+) ?([A-Za-z]*)", text.strip())
    try:
        assert match is not None
        return float(match.group(1)) * UNITS[match.group(2)]
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--memory {text!r}: write a number of bytes with a unit, as in 80GiB or 500MB") from error
