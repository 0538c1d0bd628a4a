"""PEER and its rivals as modules on one device: `module(x, mask=None) -> y`, both (..., dim)."""

from peerlm.layers.baselines import DenseFFW, ExpertChoiceMoE, ProductKeyMemory, TokenChoiceMoE
from peerlm.layers.expert_table import ExpertTable
from peerlm.layers.peer import PEER
from peerlm.layers.product_keys import ProductKeys
from peerlm.layers.query_norm import QueryBatchNorm, share_statistics

__all__ = [
    "PEER",
    "DenseFFW",
    "ExpertChoiceMoE",
    "ExpertTable",
    "ProductKeyMemory",
    "ProductKeys",
    "QueryBatchNorm",
    "TokenChoiceMoE",
    "share_statistics",
]
