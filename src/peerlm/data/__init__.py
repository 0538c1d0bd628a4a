"""Text to tokens to batches: sources, preparation, memory-mapped shards, deterministic order."""

from peerlm.data.batching import Batch, TokenWindows, batches, sequential_batches, window_order
from peerlm.data.manifest import SPLITS, Manifest
from peerlm.data.opening import open_shards
from peerlm.data.preparation import prepare
from peerlm.data.shards import TokenShards
from peerlm.data.sources import read_documents
from peerlm.data.tokenizer import END_OF_TEXT, load_tokenizer

__all__ = [
    "END_OF_TEXT",
    "SPLITS",
    "Batch",
    "Manifest",
    "TokenShards",
    "TokenWindows",
    "batches",
    "load_tokenizer",
    "open_shards",
    "prepare",
    "read_documents",
    "sequential_batches",
    "window_order",
]
