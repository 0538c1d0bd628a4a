"""What to train for a budget: backbone, experts and tokens that a fitted law expects the least loss of."""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from peerlm.accounting import Cost, model_cost
from peerlm.errors import UserError, listed
from peerlm.evaluate.likelihood import Report, silent
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.model.configuration_peer import CONFIGURABLE_KINDS, INNER, kinds_of_blocks, parts_of
from peerlm.model.modeling_peer import build_ffw
from peerlm_studies.memory import training_bytes
from peerlm_studies.scaling.fit import CONSTANTS, Law, interval
from peerlm_studies.scaling.points import SIZES, embedding_parameters, experts_of, kind_of
from peerlm_studies.scaling.spend import check_spend

WIDTHS = tuple(dict.fromkeys(8 * round(4 * 2 ** (step / 4)) for step in range(17))) + tuple(
    dict.fromkeys(64 * round(8 * 2 ** (step / 4)) for step in range(1, 17))
)
"""Widths that are tried, about a fifth apart: 32 to 512 in steps of 8, to 8,192 in steps of 64."""
FAR = 10.0
"""Times beyond the fitted budgets from which a plan has ranges alone: at 3 times it was wrong by 2 to 6% of
the loss (docs/results.md, "Scaling law"), and methods differ by no more."""


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
    row_bytes: int
    """Of tables, that a token reads in a forward pass (`peerlm.accounting`)."""
    decoding_bytes: int
    """Of all parameters, that a token alone reads."""
    table_gib: float
    """Tables with AdamW's moments."""
    warnings: tuple[str, ...]
    """In what it lies outside of the runs that the law was fitted to."""
    ranges: Mapping[str, tuple[float, float]] | None = None
    """For a budget more than `FAR` times beyond the fitted ones, and then in place of the numbers above: each draw of
    the bootstrap has a best model of its own, and this is the middle 95% of each of its figures."""


def plan_model(
    law: Mapping[str, Any],
    *,
    flops: float,
    memory: float = math.inf,
    row_bytes: float = math.inf,
    method: str | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
    report: Report = silent,
) -> list[Candidate]:
    """The best model of each method for a budget, that of least expected loss first.

    Widths are tried from 32 to 8,192, with a block for each 64 of width, at least four. Experts and heads are tried by
    powers of four and two, within what the law's runs varied; beyond that the law guesses; all other settings are those
    of its largest run. FLOPs are the accounting's, so that what the index costs counts.

    Where any method's budgets are far (`times_beyond`), methods stand in the law's order, for nothing says which is
    best there.

    Args:
        law: what `scaling` returns.
        flops: of training.
        memory: bytes for training (`training_bytes`, one window at a time).
        row_bytes: of tables that a token may read in a forward pass, at the most.
        method: only this; None: all.
        vocab_size, context: of the model; None: of the fit, to whose text and tokens alone losses apply.
        report: called with how many models were tried, and how many there are.

    Raises:
        UserError: a figure out of range, a method that the law lacks, or nothing fits.
    """
    check_spend(flops, memory, row_bytes)
    fits = chosen_fits(law, method)
    models = {name: list(_models(fit)) for name, fit in fits.items()}
    total = sum(map(len, models.values()))
    tried: dict[str, list[_Tried]] = {name: [] for name in fits}
    for done, (fitted, model) in enumerate(((name, model) for name in fits for model in models[name]), start=1):
        found = _try(fits[fitted], model, flops, memory, row_bytes, vocab_size, context)
        tried[fitted] += [] if found is None else [found]
        report(done, total)
    best = [_best(name, fits[name], found, flops) for name, found in tried.items() if found]
    if not best:
        limits = [
            f"{flops:g} FLOPs",
            *([] if math.isinf(memory) else [f"{memory / 2**30:.3g} GiB"]),
            *([] if math.isinf(row_bytes) else [f"{row_bytes:,.0f} bytes of rows per token"]),
        ]
        raise UserError(
            f"no model of at least 32 wide trains on one window within {', '.join(limits)}, with as few experts per "
            "token as the law's runs had: allow more"
        )
    return best if any(each.ranges for each in best) else sorted(best, key=lambda candidate: candidate.loss)


def chosen_fits(law: Mapping[str, Any], method: str | None) -> dict[str, Mapping[str, Any]]:
    """The fits of a law by method, or that of one; raises UserError where it lacks that."""
    fits: dict[str, Mapping[str, Any]] = law["methods"]
    if method is not None and method not in fits:
        raise UserError(f"the law has no method {method!r}: choose from {listed(fits)}")
    return fits if method is None else {method: fits[method]}


def times_beyond(fit: Mapping[str, Any], flops: float) -> float:
    """How many times a budget is above the largest that a law was fitted to, or below the smallest; 1 within."""
    low, high = fit["flops"]
    return max(flops / high, low / flops, 1.0)


def _models(fit: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The [model] sections that are tried."""
    base = {name: value for name, value in fit["model"].items() if name not in ("intermediate_size", "head_dim")}
    kind = kind_of(base)
    for width in WIDTHS:
        named = base.get("ffw_layers")
        if isinstance(named, list):
            whole = next((each for each in named if kind in parts_of(each)), kind)
            ways = (whole, whole + INNER, None)
            named = next((way for way in ways if named == kinds_of_blocks(way, len(named))), named)
        layers = len(named) if isinstance(named, list) else max(4, width // 64)
        heads = 4 if width <= 512 else width // 64
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        model = {**base, **sizes, "ffw_layers": named}
        model.pop("num_key_value_heads", None)
        if base.get("parallel_intermediate_size"):
            model["parallel_intermediate_size"] = round(
                base["parallel_intermediate_size"] * width / base["hidden_size"]
            )
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


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A model that the budget and the memory suffice for."""

    model: Mapping[str, Any]
    cost: Cost
    tokens: int
    needed: int
    """Bytes for training."""
    at: dict[str, float]
    """Where it is, as the arguments of `Law.loss`."""


def _try(
    fit: Mapping[str, Any],
    model: Mapping[str, Any],
    flops: float,
    memory: float,
    row_bytes: float,
    vocab_size: int | None,
    context: int | None,
) -> _Tried | None:
    """A model with its cost; None where the budget does not reach for a window, or memory or bytes for the model."""
    context = fit["context"] if context is None else context
    settings = {
        **model,
        "vocab_size": fit["vocab_size"] if vocab_size is None else vocab_size,
        "max_position_embeddings": context,
    }
    cost = _cost(settings, context)
    tokens = int(flops / cost.training_flops_per_token)
    needed = training_bytes(cost.total_parameters, _backbone_config(settings), tokens=context)
    if tokens < context or needed > memory or cost.row_bytes_per_token > row_bytes:
        return None
    granularity, expansion = experts_of(model)
    at = {
        "size": float(cost.active_parameters - embedding_parameters(settings, settings["vocab_size"])),
        "tokens": float(tokens),
        "granularity": granularity,
        "expansion": expansion,
    }
    return _Tried(model=model, cost=cost, tokens=tokens, needed=needed, at=at)


def _best(name: str, fit: Mapping[str, Any], tried: Sequence[_Tried], flops: float) -> Candidate:
    """The model that the law expects the least loss of, and where the budget is far, what its draws disagree on."""
    everywhere = {key: np.array([each.at[key] for each in tried]) for key in tried[0].at}
    drawn_losses = [
        Law(**dict(zip(CONSTANTS, drawn, strict=True))).loss(**everywhere)  # type: ignore[arg-type]
        for drawn in fit["bootstrap"]
    ]
    losses = Law(**fit["constants"]).loss(**everywhere)  # type: ignore[arg-type]
    place = int(np.argmin(losses))
    chosen = tried[place]
    low, high = interval([each[place] for each in drawn_losses])  # type: ignore[index]
    figures = _figures(chosen)
    ranges = None
    if times_beyond(fit, flops) > FAR:
        of_draws = [{"loss": float(np.min(each)), **_figures(tried[int(np.argmin(each))])} for each in drawn_losses]
        ranges = {key: interval([each[key] for each in of_draws]) for key in of_draws[0]}
    granularity, expansion = experts_of(chosen.model)
    return Candidate(
        method=name,
        loss=float(losses[place]),  # type: ignore[index]
        low=low,
        high=high,
        experts=round(granularity * expansion) if figures["active_experts"] else 0,
        **figures,
        ranges=ranges,
        warnings=tuple(_warnings({**chosen.at, "flops": flops}, {**fit["ranges"], "flops": fit["flops"]})),
    )


def _figures(tried: _Tried) -> dict[str, Any]:
    """What a plan says of a model, by the names of `Candidate`."""
    kind = kind_of(tried.model)
    return {
        "hidden_size": tried.model["hidden_size"],
        "layers": tried.model["num_hidden_layers"],
        "active_experts": 0 if kind == "dense" else round(tried.at["granularity"]),
        "heads": tried.model[kind][SIZES[kind][1]] if kind in ("peer", "pkm") else 0,
        "total_parameters": tried.cost.total_parameters,
        "active_parameters": tried.cost.active_parameters,
        "tokens": tried.tokens,
        "memory_gib": tried.needed / 2**30,
        "row_bytes": tried.cost.row_bytes_per_token,
        "decoding_bytes": tried.cost.parameter_bytes_per_token,
        "table_gib": tried.cost.table_training_bytes / 2**30,
    }


def _cost(settings: Mapping[str, Any], context: int) -> Cost:
    """Of a model, from that of its backbone and of one feed-forward layer of each kind, since costs add up."""
    layers = settings["num_hidden_layers"]
    if settings.get("share_tables"):  # what layers share counts once
        with torch.device("meta"):
            return model_cost(PeerForCausalLM(PeerConfig(**settings)), context)
    blocks = Counter(kinds_of_blocks(settings.get("ffw_layers"), layers))
    one, two = (_backbone_cost(_backbone_text(settings, count), context) for count in (1, 2))
    dense, of_kind = (
        {kind: _layer_cost(kind, _layer_text(settings, kind), context) for kind in kinds}
        for kinds in (("dense",), blocks)
    )
    return Cost(
        **{
            field.name: getattr(one, field.name)
            + (layers - 1) * (getattr(two, field.name) - getattr(one, field.name))
            - layers * getattr(dense["dense"], field.name)
            + sum(count * getattr(of_kind[kind], field.name) for kind, count in blocks.items())
            for field in fields(Cost)
        }
    )


def _backbone_text(settings: Mapping[str, Any], layers: int) -> str:
    """The settings of a model of dense blocks, as JSON: every method and number of experts asks for the same."""
    left_out = (*CONFIGURABLE_KINDS, "share_tables", "ffw_init_scale", "parallel_intermediate_size")
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return json.dumps({**kept, "ffw_layers": "dense", "num_hidden_layers": layers}, sort_keys=True)


def _backbone_config(settings: Mapping[str, Any]) -> PeerConfig:
    return _config(_backbone_text(settings, settings["num_hidden_layers"]))


@functools.cache
def _config(text: str) -> PeerConfig:
    return PeerConfig(**json.loads(text))


@functools.cache
def _backbone_cost(text: str, context: int) -> Cost:
    with torch.device("meta"):
        return model_cost(PeerForCausalLM(_config(text)), context)


def _layer_text(settings: Mapping[str, Any], kind: str) -> str:
    """The settings that a block's feed-forward layer of this kind depends on, as JSON."""
    names = ("hidden_size", "intermediate_size", "parallel_intermediate_size", *parts_of(kind))
    return json.dumps({name: settings.get(name) for name in names}, sort_keys=True)


@functools.cache
def _layer_cost(kind: str, settings: str, context: int) -> Cost:
    """Of one feed-forward layer; its settings are JSON."""
    config = SimpleNamespace(**json.loads(settings))
    with torch.device("meta"):
        return model_cost(build_ffw(config, kind), context)  # type: ignore[arg-type]


def _warnings(at: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> Iterator[str]:
    for name, value in at.items():
        low, high = ranges[name]
        if not 0.99 * low <= value <= 1.01 * high:
            yield f"{name} {value:.3g} is outside of what was fitted, {low:.3g} to {high:.3g}"


def plan_row(candidate: Candidate) -> dict[str, Any]:
    """A candidate ready for JSON: numbers, or for a budget that is far ranges [low, high] and no number."""
    row = {name: value for name, value in asdict(candidate).items() if name != "ranges"}
    if candidate.ranges is None:
        return row
    kept = {name: row[name] for name in ("method", "experts", "warnings")}
    return {**kept, "ranges": {name: list(ends) for name, ends in candidate.ranges.items()}}


def plan_quantities(candidate: Candidate) -> dict[str, str]:
    """What a table shows of a candidate."""
    shown = {
        "loss": f"{candidate.loss:.3f} ({candidate.low:.3f} to {candidate.high:.3f})",
        "width": f"{candidate.hidden_size:,}",
        "blocks": f"{candidate.layers:,}",
        "tokens": f"{candidate.tokens:.3g}",
        "parameters": f"{candidate.total_parameters:.3g}",
        "active parameters": f"{candidate.active_parameters:.3g}",
        "memory, GiB": f"{candidate.memory_gib:.3g}",
        "rows read per token, bytes": f"{candidate.row_bytes:.3g}",
        "read in decoding, bytes": f"{candidate.decoding_bytes:.3g}",
        "tables with optimizer, GiB": f"{candidate.table_gib:.3g}",
    }
    if candidate.experts:
        shown["experts in a layer"] = f"{candidate.experts:,}"
        shown["active experts"] = f"{candidate.active_experts:,}"
    if candidate.heads:
        shown["heads"] = f"{candidate.heads:,}"
    names = ["loss", "hidden_size", "layers", "tokens", "total_parameters", "active_parameters", "memory_gib"]
    names += ["row_bytes", "decoding_bytes", "table_gib"]
    for label, name in zip(shown, names, strict=False):
        if candidate.ranges is not None:
            low, high = candidate.ranges[name]
            whole = name in ("hidden_size", "layers")
            shown[label] = f"{low:,.0f} to {high:,.0f}" if whole else f"{low:.3g} to {high:.3g}"
    if candidate.ranges is not None:
        for label in ("active experts", "heads"):
            shown.pop(label, None)
    elif candidate.warnings:
        shown["outside of the fit"] = "\n".join(candidate.warnings)
    return shown


def preface(law: Mapping[str, Any], flops: float, method: str | None) -> str:
    """What is to be said before a plan for a budget that is far; empty for others."""
    fits = chosen_fits(law, method)
    far = {name: fit["flops"] for name, fit in fits.items() if times_beyond(fit, flops) > FAR}
    if not far:
        return ""
    low, high = min(ends[0] for ends in far.values()), max(ends[1] for ends in far.values())
    above = flops > high
    times = flops / high if above else low / flops
    place = "the largest budget" if above else "less than the smallest budget"
    place += f" that the law was fitted to, {high if above else low:.2g}"
    of = "" if len(far) == len(fits) else f" of {listed(far)}"
    order = "" if len(fits) == 1 else " Methods stand in the order of the law: which is best here is not known."
    return (
        f"Extrapolation{of}: {flops:.3g} FLOPs is {times:.2g} times {place}. No run supports "
        f"what follows.{order}\n\n"
        "Each range is the middle 95% over the bootstrap's draws of the law, each with a best model of its own. It "
        "leaves out how wrong the law itself may be so far away.\n\n"
        "To know more, train some sizes at budgets in between, and fit the law to these runs too with `peerlm scaling`."
    )
