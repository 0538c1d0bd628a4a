"""Hashed n-grams against loops, and their rows under the optimizer."""

import math

import pytest
import torch
from torch import Tensor, nn

from peerlm.accounting import model_cost
from peerlm.layers import HashedNgrams, ParallelFFW
from peerlm.layers.dense import DenseFFW
from peerlm.layers.hashed_ngrams import NgramIndex, preceding
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.usage import record_usage


def small(**settings: object) -> HashedNgrams:
    return HashedNgrams(6, **({"num_rows": 23, "hashes": 2, "row_dim": 3} | settings)).double()


def wrapped(number: int) -> int:
    """As int64 wraps it."""
    return (number + 2**63) % 2**64 - 2**63


def row_by_hand(index: NgramIndex, lookup: int, tokens: list[int]) -> int:
    begin, rows, numbers = index._hashes[lookup]
    mixed = 0
    for token, number in zip(tokens, numbers, strict=False):
        mixed ^= wrapped((token + 1) * number)
    mixed = wrapped((mixed ^ (mixed >> 32)) * 0x1B03738712FAD5C9)
    return begin + (mixed ^ (mixed >> 29)) % rows


@pytest.mark.parametrize("weight_scale", [1.0, 4.0])
def test_equals_loops(weight_scale: float) -> None:
    layer = small(weight_scale=weight_scale)
    x, tokens = torch.randn(5, 6, dtype=torch.float64), torch.randint(-1, 1000, (5, 3))
    expected = []
    for vector, ids in zip(x, tokens.tolist(), strict=True):
        rows = [row_by_hand(layer.index, lookup, ids) for lookup in range(4)]
        read = weight_scale * torch.cat([layer.table.rows[row] for row in rows])
        key = layer.key_proj.weight @ read
        key = key / (key.square().mean() + torch.finfo(torch.float64).eps).sqrt() * layer.key_scale
        query = vector / (vector.square().mean() + torch.finfo(torch.float64).eps).sqrt()
        expected.append(torch.sigmoid(query @ key / math.sqrt(6)) * (layer.value_proj.weight @ read))
    torch.testing.assert_close(layer(x, tokens=tokens), torch.stack(expected))


def test_gradients() -> None:
    layer, tokens = small(), torch.randint(1000, (4, 3))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,), {"tokens": tokens})

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_bigrams_see_two_tokens_and_each_hash_has_its_own_rows() -> None:
    index = NgramIndex(1000, orders=(2, 3), hashes=2, seed=0)
    tokens = torch.randint(50, (200, 3))
    other = tokens.clone()
    other[:, 2] += 1
    _, ids = index(tokens)
    _, changed = index(other)
    assert torch.equal(ids[:, :2], changed[:, :2])
    assert (ids[:, 2:] != changed[:, 2:]).float().mean() > 0.98
    for lookup in range(4):
        assert ids[:, lookup].min() >= 250 * lookup
        assert ids[:, lookup].max() < 250 * (lookup + 1)
    _, again = NgramIndex(1000, orders=(2, 3), hashes=2, seed=0)(tokens)
    assert torch.equal(ids, again)
    _, of_another_seed = NgramIndex(1000, orders=(2, 3), hashes=2, seed=1)(tokens)
    assert (ids != of_another_seed).float().mean() > 0.98


def test_hashes_spread_evenly_and_collide_apart() -> None:
    index = NgramIndex(2048, orders=(2,), hashes=2, seed=0)
    tokens = torch.cartesian_prod(torch.arange(128), torch.arange(128))
    _, ids = index(tokens)
    first, second = ids[:, 0, 0], ids[:, 1, 0] - 1024
    loads = first.bincount(minlength=1024).double()  # 16 each, as of a Poisson distribution
    assert loads.var().item() == pytest.approx(16, rel=0.25)
    # n-grams that meet in one hash meet in the other by chance
    pairs = (first * 1024 + second).unique()
    assert len(pairs) > 0.98 * len(tokens)


def test_rows_have_sparse_gradients_and_only_those_move() -> None:
    layer = small(num_rows=400)
    optimizer = RowAdamW(parameter_groups(layer), lr=0.1, lazy=True)
    before = layer.table.rows.detach().clone()
    tokens = torch.randint(1000, (3, 3))
    layer(torch.randn(3, 6, dtype=torch.float64), tokens=tokens).square().sum().backward()
    assert layer.table.rows.grad.is_sparse
    optimizer.step()
    _, ids = layer.index(tokens)
    moved = (layer.table.rows != before).any(dim=-1).nonzero().flatten()
    assert set(moved.tolist()) == set(ids.flatten().tolist())


def test_scaled_rows_start_the_same_and_move_further() -> None:
    x, tokens = torch.randn(4, 6), torch.randint(1000, (4, 3))

    def before_and_after_a_step(weight_scale: float, multiplier: float) -> list[Tensor]:
        torch.manual_seed(1)
        layer = small(weight_scale=weight_scale).float()
        found = [layer(x, tokens=tokens).detach()]
        optimizer = RowAdamW(parameter_groups(layer, table_lr_multiplier=multiplier), lr=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * multiplier if group["name"] == "table" else 0.0
        layer(x, tokens=tokens).square().sum().backward()
        optimizer.step()
        return [*found, layer(x, tokens=tokens).detach()]

    scaled, plain = before_and_after_a_step(8.0, 0.5), before_and_after_a_step(1.0, 4.0)
    for found, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(scaled[0], scaled[1], atol=1e-2)


def test_preceding_stops_where_a_text_begins() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert preceding(ids, 3)[0].tolist() == [[5, -1, -1], [6, 5, -1], [7, 6, 5], [8, 7, 6]]
    follows = torch.tensor([[False, True, False, True]])
    assert preceding(ids, 3, follows)[0].tolist() == [[5, -1, -1], [6, 5, -1], [7, -1, -1], [8, 7, -1]]
    assert preceding(ids, 3, past=2, new=2)[0].tolist() == [[7, 6, 5], [8, 7, 6]]


def test_costs_and_usage() -> None:
    layer = small()
    cost = model_cost(layer, context=1)
    assert cost.forward_flops_per_token == 2 * 2 * 12 * 6
    assert cost.total_parameters - cost.active_parameters == (23 - 4) * 3
    assert cost.row_bytes_per_token == 4 * 3 * 8
    with record_usage(layer) as usage:
        layer(torch.randn(2, 6).double(), torch.tensor([True, False]), torch.randint(9, (2, 3)))
    assert usage["index"].retrievals_N.sum() == 4


def test_beside_another_layer() -> None:
    layer = ParallelFFW({"hashed_ngrams": small(), "dense": DenseFFW(6).double()})
    x, tokens = torch.randn(4, 6, dtype=torch.float64), torch.randint(9, (4, 3))
    assert layer.reads_tokens == 3
    ngrams, dense = layer.children()
    torch.testing.assert_close(layer(x, None, tokens), ngrams(x, None, tokens) + dense(x))
    assert ParallelFFW({"dense": DenseFFW(6)}).reads_tokens == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orders": []}, r"orders is \[\]; give whole numbers of at least 1"),
        ({"orders": [2, 0]}, r"orders is \[2, 0\]; give whole numbers of at least 1"),
        ({"orders": [2, 2]}, r"orders is \[2, 2\]; name each order once"),
        ({"num_rows": 3}, r"num_rows is 3; each of 2 \* 2 hashes needs one at least"),
        ({"row_dim": 0}, "row_dim is 0; it must be at least 1"),
        ({"hashes": 0}, "hashes is 0; it must be at least 1"),
        ({"weight_scale": 0.0}, r"weight_scale is 0.0; it multiplies weights, so take a number above 0"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_impossible_inputs() -> None:
    layer: nn.Module = small()
    with pytest.raises(ValueError, match="looked up by token ids: pass tokens, of a model input_ids"):
        layer(torch.ones(2, 6).double())
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 2\); for this x it must be \(2, 3\)"):
        layer(torch.ones(2, 6).double(), tokens=torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("row_format", ["int8", "float8_e4m3fn", "int4"])
def test_rows_that_could_not_be_mixed_are_refused(row_format: str) -> None:
    with pytest.raises(ValueError, match=f"row_format is '{row_format}'; hashed n-grams have rows in 'float32' or"):
        small(row_format=row_format)
