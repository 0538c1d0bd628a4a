"""Rows of runs to what a law is fitted to, grouped by all settings that a law has no term for."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peerlm_studies.scaling.fit import RunPoint

Row = Mapping[str, Any]

SIZES = {
    "peer": ("num_experts", "heads", "experts_per_head"),
    "pkm": ("num_values", "heads", "values_per_head"),
    "expert_choice": ("num_experts", "capacity_factor"),
    "token_choice": ("num_experts", "experts_per_token"),
    "fine_grained_moe": ("num_experts", "experts_per_token"),
    "hashed_ngrams": ("num_rows", "hashes", "orders"),
}
"""By kind of layer, the settings that are its expansion and granularity: all others must be alike in a group."""
BACKBONE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "parallel_intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in size, tokens, number of experts and seed alone."""

    name: str
    """Method of the first."""
    rows: list[Row]
    points: list[RunPoint]
    """Of each row."""

    @property
    def model(self) -> dict[str, Any]:
        """The [model] of the run with the most FLOPs."""
        return dict(max(self.rows, key=lambda row: row["summary"]["flops"])["config"]["model"])


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Group rows, in the order of first appearance; a row that stands in several files counts once."""
    found: dict[str, list[Row]] = {}
    for row in {row["key"]: row for row in rows}.values():
        found.setdefault(_signature(row["config"]), []).append(row)
    groups: list[Group] = []
    for members in found.values():
        taken = {group.name for group in groups}
        name = next(name for name in _names(members[0]["method"]) if name not in taken)
        groups.append(Group(name=name, rows=members, points=[point_of(row) for row in members]))
    return groups


def _names(method: str) -> Any:
    yield method
    number = 2
    while True:
        yield f"{method} ({number})"
        number += 1


def _signature(config: Mapping[str, Any]) -> str:
    """All that the law has no term for, as text; a setting left out, or not yet known to the row, has its default."""
    from peerlm.model.configuration_peer import FFW_KINDS, PeerConfig
    from peerlm.train.config import OptimConfig

    kind = kind_of(config["model"])
    model = _with_defaults(PeerConfig, config["model"])
    model = {name: value for name, value in model.items() if name not in BACKBONE}
    for other, names in SIZES.items():
        settings = _with_defaults(FFW_KINDS[other], model.pop(other, None) or {})
        if other == kind:
            model[other] = {name: value for name, value in settings.items() if name not in names}
    data = {name: value for name, value in config["data"].items() if name not in ("workers", "micro_batch_size")}
    optim = _with_defaults(OptimConfig, config["optim"])
    # Losses on other windows do not compare, and a model that grew has had several sizes.
    windows = config.get("eval", {}).get("final_windows")
    grow = config.get("grow") or {}
    return json.dumps(
        [model, data, optim, config["precision"], windows, grow if grow.get("at") else None], sort_keys=True
    )


def kinds_of(model: Mapping[str, Any]) -> list[str]:
    """The kinds of layers in a [model] that are not dense, alone or beside another; each once, in order of blocks."""
    from peerlm.model.configuration_peer import kinds_of_blocks, parts_of

    kinds = kinds_of_blocks(model.get("ffw_layers", "peer"), model.get("num_hidden_layers", 1))
    return list(dict.fromkeys(part for kind in kinds for part in parts_of(kind) if part in SIZES))


def kind_of(model: Mapping[str, Any]) -> str:
    """Of `kinds_of` the first in `SIZES`: an index counts before n-grams beside it; "dense" where all layers are."""
    kinds = kinds_of(model)
    return next((kind for kind in SIZES if kind in kinds), "dense")


def point_of(row: Row) -> RunPoint:
    """A row as the law sees it: size is what a token touches, without embeddings."""
    model, summary = row["config"]["model"], row["summary"]
    granularity, expansion = experts_of(model)
    return RunPoint(
        size=summary["active_parameters"] - embedding_parameters(model, row["config"]["data"]["vocab_size"]),
        tokens=summary["tokens"],
        granularity=granularity,
        expansion=expansion,
        loss=summary["validation_loss"],
    )


def embedding_parameters(model: Mapping[str, Any], vocab_size: int) -> int:
    """Of embeddings, and of the output where it is another matrix, as far as a token touches them (`model_cost`)."""
    rows = int(model.get("vocab_size", vocab_size))
    if not model.get("tie_word_embeddings", True):
        rows += 1  # of the embeddings, beside all of the output
    return rows * int(model["hidden_size"])


def experts_of(model: Mapping[str, Any]) -> tuple[float, float]:
    """Granularity, experts that a token touches in a layer, and expansion, experts over that; 1 and 1 if dense.

    Large experts count as one expert per token.
    """
    kind = kind_of(model)
    if kind == "dense":
        return 1.0, 1.0
    from peerlm.model.configuration_peer import FFW_KINDS

    settings = _with_defaults(FFW_KINDS[kind], model.get(kind) or {})
    experts = float(settings[SIZES[kind][0]])
    if kind in ("peer", "pkm"):
        active = float(settings[SIZES[kind][1]] * settings[SIZES[kind][2]])
        return active, experts / active
    if kind == "hashed_ngrams":
        lookups = float(settings["hashes"] * len(settings["orders"]))
        return lookups, experts / lookups
    return float(settings[SIZES[kind][1]]), experts / float(settings[SIZES[kind][1]])


def _with_defaults(configured: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(configured).parameters.items()
    defaults = {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}
    return {**defaults, **settings}
