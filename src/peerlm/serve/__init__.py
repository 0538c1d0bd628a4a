"""Serving: requests that join and leave one batch while it runs."""

from peerlm.serve.engine import Engine
from peerlm.serve.handle import Handle
from peerlm.serve.protocol import EngineProtocol, Histogram, InUse, LayerUse, Loaded, QueueFull, Stats
from peerlm.serve.request import MAX_LOGPROBS, Event, Request, SamplingParams, TokenLogprob

__all__ = [
    "MAX_LOGPROBS",
    "Engine",
    "EngineProtocol",
    "Event",
    "Handle",
    "Histogram",
    "InUse",
    "LayerUse",
    "Loaded",
    "QueueFull",
    "Request",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
]
