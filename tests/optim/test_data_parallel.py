"""Tables under RowAdamW get dense gradients within DistributedDataParallel, and row gradients wherever else."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from peerlm import PEER
from peerlm.optim import RowAdamW

DIM = 8
BATCHES = torch.randn(8, 3, DIM, generator=torch.Generator().manual_seed(0))


class Checkpointed(nn.Module):
    def __init__(self, layer: PEER, reentrant: bool):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()  # without which reentrant checkpoints have no gradient
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def new_layer() -> PEER:
    torch.manual_seed(0)
    return PEER(DIM, num_experts=64, heads=1, experts_per_head=3, key_dim=4, query_norm="layer")


def gradients_under_training(module: nn.Module, layer: PEER, optimizer: RowAdamW) -> list[bool]:
    """Whether the table's gradient was sparse, by step."""
    sparse = []
    for x in BATCHES:
        optimizer.zero_grad()
        module(x.clone()).square().mean().backward()
        assert layer.experts.rows.grad is not None
        sparse.append(layer.experts.rows.grad.is_sparse)
        optimizer.step()
    return sparse


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant checkpoint"])
def test_a_group_of_one_rank_trains_as_without_it(how: str) -> None:
    layer, alone = new_layer(), new_layer()
    module = layer if how == "plain" else Checkpointed(layer, reentrant=how.startswith("reentrant"))
    optimizer, other = RowAdamW(layer.parameters(), lr=0.01), RowAdamW(alone.parameters(), lr=0.01)
    parallel = DistributedDataParallel(module)
    assert not any(gradients_under_training(parallel, layer, optimizer))
    assert all(gradients_under_training(alone, alone, other))
    del parallel
    torch.testing.assert_close(layer.experts.read(), alone.experts.read())
    assert all(gradients_under_training(layer, layer, optimizer))  # no longer within it


@pytest.mark.usefixtures("two_ranks")
def test_a_model_of_one_rank_alone_keeps_its_row_gradients() -> None:
    layer = new_layer()
    assert all(gradients_under_training(layer, layer, RowAdamW(layer.parameters(), lr=0.01)))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant checkpoint"])
def test_fused_updates_are_refused_where_gradients_are_exchanged(how: str) -> None:
    layer = new_layer()
    module = layer if how == "plain" else Checkpointed(layer, reentrant=how.startswith("reentrant"))
    optimizer = RowAdamW(layer.parameters(), lr=0.01, fused=True)
    before = copy.deepcopy(layer.experts.rows)
    parallel = DistributedDataParallel(module)
    with pytest.raises(RuntimeError, match="fused=True cannot wait for the gradients of other ranks: use fused=False"):
        parallel(BATCHES[0].clone()).square().mean().backward()
    with torch.no_grad():
        parallel(BATCHES[0].clone())  # reads alone
    del parallel, optimizer
    assert torch.equal(layer.experts.rows, before)


@pytest.mark.usefixtures("two_ranks")
def test_fused_updates_of_one_rank_among_several_are_said() -> None:
    layer = new_layer()
    optimizer = RowAdamW(layer.parameters(), lr=0.01, fused=True)
    with pytest.warns(
        UserWarning, match="by the gradients of this rank alone.*DistributedDataParallel and fused=False"
    ):
        layer(BATCHES[0]).square().mean().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            layer(BATCHES[0])
