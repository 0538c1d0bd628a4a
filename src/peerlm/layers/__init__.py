"""PEER and its baselines as modules on one device: `module(x, mask=None) -> y`, both (..., dim)."""

from peerlm.layers.dense import DenseFFW
from peerlm.layers.expert_table import ExpertTable
from peerlm.layers.fine_grained_moe import FineGrainedMoE
from peerlm.layers.hashed_ngrams import HashedNgrams
from peerlm.layers.moe import ExpertChoiceMoE, TokenChoiceMoE
from peerlm.layers.output_gate import OutputGate
from peerlm.layers.parallel import ParallelFFW
from peerlm.layers.peer import PEER
from peerlm.layers.product_key_memory import ProductKeyMemory
from peerlm.layers.product_keys import ProductKeys
from peerlm.layers.query_norm import QueryBatchNorm
from peerlm.layers.shared_statistics import share_statistics
from peerlm.layers.table import Table

__all__ = [
    "PEER",
    "DenseFFW",
    "ExpertChoiceMoE",
    "ExpertTable",
    "FineGrainedMoE",
    "HashedNgrams",
    "OutputGate",
    "ParallelFFW",
    "ProductKeyMemory",
    "ProductKeys",
    "QueryBatchNorm",
    "Table",
    "TokenChoiceMoE",
    "share_statistics",
]
