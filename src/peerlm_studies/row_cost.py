"""What the model of a row costs in bytes, from the row itself or, where it is older, from its configuration."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from peerlm.accounting import BYTES, model_cost
from peerlm.model import PeerConfig, PeerForCausalLM

Row = Mapping[str, Any]


def row_bytes(row: Row) -> dict[str, int] | None:
    """The figures of `peerlm.accounting.BYTES` for a row's model.

    Of rows from before these were counted, the model is built without weights. None where that cannot be said: the
    configuration is not there or no longer read, or the layers grew within the run.
    """
    summary, config = row["summary"], row["config"]
    if all(name in summary for name in BYTES):
        return {name: summary[name] for name in BYTES}
    if "model" not in config or (config.get("grow") or {}).get("at"):
        return None
    data = config["data"]
    settings = {"vocab_size": data["vocab_size"], "max_position_embeddings": data["context"], **config["model"]}
    return _of_model(json.dumps(settings, sort_keys=True), data["context"])


def tokens_per_pass(row: Row) -> int:
    """Tokens in a forward pass of a run's training."""
    data = row["config"]["data"]
    return int((data.get("micro_batch_size") or data["batch_size"]) * data["context"])


def read_bytes_per_token(row: Row) -> float | None:
    """Bytes of parameters that a forward pass of a run's training reads, over its tokens; None as of `row_bytes`."""
    found = row_bytes(row)
    if found is None:
        return None
    shared = found["shared_bytes_per_pass"] / tokens_per_pass(row)
    return min(found["row_bytes_per_token"] + shared, found["parameter_bytes_per_token"])


@functools.cache
def _of_model(settings: str, context: int) -> dict[str, int] | None:
    try:
        with torch.device("meta"):
            model = PeerForCausalLM(PeerConfig(**json.loads(settings)))
    except (ValueError, TypeError, StrictDataclassError):
        return None
    cost = model_cost(model, context)
    return {name: getattr(cost, name) for name in BYTES}
