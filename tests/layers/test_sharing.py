"""Layers that look rows up in another layer's table."""

import copy
from typing import Any

import pytest
import torch

from peerlm.layers import PEER
from peerlm.optim import RowAdamW

pytestmark = pytest.mark.whole_tables("trains the parameter of a table")

SMALL: dict[str, Any] = {"num_experts": 16, "heads": 2, "experts_per_head": 3, "key_dim": 8}


def test_kernels_that_update_rows_in_the_backward_pass_wait_for_all_layers() -> None:
    layers = [PEER(16, **SMALL).eval() for _ in range(2)]
    layers[1].share_tables_of(layers[0])
    twins = copy.deepcopy(layers)
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-1, "weight_decay": 0.0}
    optimizers = [RowAdamW([layers[0].experts.rows], fused=True, **options)]
    optimizers.append(torch.optim.AdamW([twins[0].experts.rows], **options))  # type: ignore[arg-type]
    x = torch.randn(9, 16)
    for pair, optimizer in zip((layers, twins), optimizers, strict=True):
        for _ in range(2):
            (pair[0](x) * pair[1](x)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    rows = [pair[0].state_dict()["experts.rows"] for pair in (layers, twins)]
    torch.testing.assert_close(*rows)


def test_sharing_that_cannot_be_is_refused() -> None:
    first, second, other = PEER(8, **SMALL), PEER(8, **SMALL), PEER(8, **(SMALL | {"num_experts": 25}))
    with pytest.raises(ValueError, match=r"tables can be shared by layers that are alike; these are PEER: .*25"):
        other.share_tables_of(first)
    second.share_tables_of(first)
    for layer, owner in ((second, first), (first, second), (first, first)):
        with pytest.raises(ValueError, match="the layers share tables already"):
            layer.share_tables_of(owner)
    integer = [PEER(8, **SMALL, row_format="int8") for _ in range(2)]
    integer[1].share_tables_of(integer[0])
    integer[0].experts.train_in_place()
    with pytest.raises(ValueError, match="has no gradient that layers which share it could add to"):
        RowAdamW([integer[0].experts.rows], lr=1e-3, fused=True, betas=(0.0, 0.9))
