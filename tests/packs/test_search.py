"""What is retrieved and mixed with packs equals an exhaustive search over the union in float64, and its equations."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peerlm.growth import grow, set_opening
from peerlm.layers import PEER
from peerlm.ops.cpu import native
from peerlm.ops.functions import ACTIVATIONS, WEIGHTINGS
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.packs.api import choose_packs, new_pack, pack_parameters
from peerlm.testing import assert_within_budget, definition, exhaustive_scores, exhaustive_search

DIM = 8
BACKENDS = ["reference", *([] if native._reason else ["cpu"])]


def packed(sizes: dict[str, int], **changes: Any) -> PEER:
    """A layer with packs of these sizes, whose vectors are drawn."""
    base = {"num_experts": 36, "heads": 3, "experts_per_head": 4, "key_dim": 6}
    layer = PEER(DIM, **base | changes).eval()
    for seed, (name, size) in enumerate(sizes.items()):
        new_pack(layer, name, size, seed=seed)
        layer.packs.by_name()[name].table.fill(nn.init.normal_)
    return layer


def union(layer: PEER, query_THX: Tensor, *, allowed: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Scores in float64 and ids of the first experts of the union, by exhaustive search."""
    index = layer.product_keys
    parts = [(index.compared(index.sub_keys), index.pairing, True)]
    if layer.packs is not None:
        parts += [
            (index.compared(pack.sub_keys), "shells", allowed is None or name in allowed)
            for name, pack in layer.packs.by_name().items()
        ]
    scores = []
    for keys, pairing, counts in parts:
        ids, ordered = exhaustive_search(query_THX, keys, keys.shape[2] ** 2, pairing)
        dense = torch.empty_like(ordered).scatter_(-1, ids, ordered)
        scores.append(dense if counts else torch.full_like(dense, -torch.inf))
    everything = torch.cat(scores, dim=-1)
    best = everything.argsort(dim=-1, descending=True, stable=True)[..., : index.experts_per_head]
    return everything.gather(-1, best), best


def rounded(layer: PEER, query_THX: Tensor, ids_THK: Tensor) -> Tensor:
    """The scores of these experts of the union as float32 makes them, from every key written out."""
    index = layer.product_keys
    parts = [(index.sub_keys, index.pairing)] + [(p.sub_keys, "shells") for p in layer.packs.by_name().values()]
    scores = [exhaustive_scores(query_THX, index.compared(keys), pairing) for keys, pairing in parts]
    return torch.cat(scores, dim=-1).gather(-1, ids_THK)


SIZES: dict[str, dict[str, int]] = {
    "one": {"law": 25},
    "fewer sub-keys than are retrieved": {"law": 9, "a": 1, "b": 4},
    "several of a size": {"b": 16, "a": 16, "c": 49, "d": 16},
}


@pytest.mark.parametrize("tokens", [1, 7, 65])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_retrieval_equals_an_exhaustive_search_of_the_union(
    backend: str, shared_keys: bool, weighting: str, sizes: dict[str, int], tokens: int
) -> None:
    layer = packed(sizes, backend=backend, shared_keys=shared_keys, weighting=weighting)
    x = torch.randn(tokens, DIM)
    weights, ids = layer.packs(x, None, layer.product_keys)
    scores, expected = union(layer, layer.product_keys.query(x))
    assert torch.equal(ids, expected)
    assert (ids >= 36).any()
    plain = WEIGHTINGS[weighting](rounded(layer, layer.product_keys.query(x), ids))
    assert_within_budget(weights, plain, WEIGHTINGS[weighting](scores))


@pytest.mark.parametrize("tokens", [1, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_packs_are_of_the_layers_length(backend: str, tokens: int) -> None:
    layer, x = packed({"law": 25, "a": 9}, backend=backend, key_norm=True), torch.randn(tokens, DIM)
    with torch.no_grad():
        for pack in layer.packs.by_name().values():
            pack.sub_keys.mul_(7)
    weights, ids = layer.packs(x, None, layer.product_keys)
    scores, expected = union(layer, layer.product_keys.query(x))
    assert torch.equal(ids, expected)
    assert ((ids >= 36).any(), (ids < 36).any()) == (True, True)
    plain = rounded(layer, layer.product_keys.query(x), ids).softmax(-1)
    assert_within_budget(weights, plain, scores.softmax(-1))


@given(st.integers(0, 2**32), st.sampled_from(BACKENDS), st.booleans(), st.sampled_from(["row-major", "shells"]))
@settings(max_examples=40)
def test_ties_go_to_the_layer_then_by_name_then_by_id(seed: int, backend: str, shared_keys: bool, pairing: str) -> None:
    layer = packed({"b": 25, "a": 16, "c": 16, "small": 4}, backend=backend, shared_keys=shared_keys, pairing=pairing)
    generator = torch.Generator().manual_seed(seed)
    index = layer.product_keys
    with torch.no_grad():
        for keys in (index.sub_keys, *(pack.sub_keys for pack in layer.packs.by_name().values())):
            keys.copy_(torch.randint(-1, 2, keys.shape, generator=generator))
    query = torch.randint(-1, 2, (9, 3, 6), generator=generator).float()
    index.query = lambda x, mask=None: query  # type: ignore[method-assign]
    weights, ids = layer.packs(torch.zeros(9, DIM), None, index)
    scores, expected = union(layer, query)
    assert torch.equal(ids, expected)
    assert_within_budget(weights, rounded(layer, query, ids).softmax(-1), scores.softmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_float32_cannot_tell_apart_are_told_apart(backend: str) -> None:
    layer = packed({"law": 16}, backend=backend, heads=1, shared_keys=True, experts_per_head=1, query_norm="none")
    index, pack = layer.product_keys, layer.packs.by_name()["law"]
    query = torch.ones(1, 1, 6)
    index.query = lambda x, mask=None: query  # type: ignore[method-assign]
    with torch.no_grad():
        index.sub_keys.fill_(-9)
        pack.sub_keys.fill_(-9)
        index.sub_keys[:, 0, 2] = pack.sub_keys[:, 0, 3] = torch.tensor([0.5, 0.25, 0.0])
        for own, other, expected in ((0.0, 2**-30, 36 + 15), (2**-30, 0.0, 14), (0.0, 0.0, 14)):
            index.sub_keys[0, 0, 2, 2], pack.sub_keys[0, 0, 3, 2] = own, other
            scores = [(keys.sum(dim=-1)).amax(dim=-1).sum() for keys in (index.sub_keys, pack.sub_keys)]
            assert scores[0] == scores[1]
            _, ids = layer.packs(torch.zeros(1, DIM), None, index)
            assert ids.item() == expected


def by_equations(layer: PEER, x: Tensor) -> Tensor:
    """The output of a layer with packs, differentiable, from scores of all written-out keys."""
    index, packs = layer.product_keys, list(layer.packs.by_name().values())
    query = index.query(x)
    scores = torch.cat(
        [
            exhaustive_scores(query, index.sub_keys, index.pairing),
            *(exhaustive_scores(query, pack.sub_keys, "shells") for pack in packs),
        ],
        dim=-1,
    )
    scores, ids = scores.topk(index.experts_per_head)
    weights = WEIGHTINGS[index.weighting](scores) * layer.weight_scale
    rows = torch.cat([layer.experts.rows, *(pack.table.rows for pack in packs)])[ids]
    hidden = torch.einsum("td,thkd->thk", x, rows[..., 0, :])
    act = ACTIVATIONS[layer.experts.activation]
    hidden = hidden * act(torch.einsum("td,thkd->thk", x, rows[..., 2, :])) if layer.experts.gated else act(hidden)
    return torch.einsum("thk,thkd->td", weights * hidden, rows[..., 1, :])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_the_equations(
    backend: str, weighting: str, shared_keys: bool, gated: bool, frozen: bool
) -> None:
    layer = packed(
        {"b": 25, "a": 9, "c": 25},
        backend=backend,
        weighting=weighting,
        shared_keys=shared_keys,
        gated=gated,
        weight_scale=3.0,
    )
    if backend == "reference":
        layer = layer.double()
    if frozen:
        layer.requires_grad_(False)
        for parameter in pack_parameters(layer, "a"):
            parameter.requires_grad_(True)
    judge = definition(layer)
    x = torch.randn(11, DIM, dtype=layer.experts.rows.dtype)
    results = []
    pieces = len(layer.experts.parts())
    for each, y in ((layer, layer(x)), (layer, by_equations(layer, x)), (judge, by_equations(judge, x.double()))):
        trained = [parameter for parameter in each.parameters() if parameter.requires_grad]
        assert len(trained) == 1 + pieces if frozen else len(trained) > 8
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    assert all(gradient.count_nonzero() or pieces > 1 for gradient in results[1])
    if backend == "reference":
        torch.testing.assert_close(*results[:2])
    else:
        assert_within_budget(*results)


def test_rows_fill_up_with_none_that_was_not_retrieved() -> None:
    layer = packed({"a": 25}, query_norm="none")
    x = torch.randn(5, DIM)
    RowAdamW(parameter_groups(layer))  # gradients of rows are sparse for it
    layer(x).sum().backward()
    _, ids = layer.packs(x, None, layer.product_keys)
    for table, first in ((layer.experts, 0), (layer.packs.by_name()["a"].table, 36)):
        touched = set()
        for parameter, rows in table.parts():
            assert parameter.grad is not None
            touched.update(torch.arange(table.num_rows)[rows][parameter.grad._indices()[0]].tolist())
        assert touched == {i - first for i in ids.flatten().tolist() if 0 <= i - first < table.num_rows}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("opening", [0, 0.5, 1])
def test_a_layer_that_grows_is_searched_as_it_is_open(opening: float, backend: str) -> None:
    layer = packed({"a": 25}, backend=backend, pairing="shells")
    grow(layer, 64)
    set_opening(layer, opening)
    x = torch.randn(9, DIM)
    weights, ids = layer.packs(x, None, layer.product_keys)
    query, keys = layer.product_keys.open_keys(layer.product_keys.query(x))
    both = (query, keys), (layer.product_keys.query(x), layer.packs.by_name()["a"].sub_keys)
    scores = {}
    for dtype in (torch.float32, torch.float64):
        own, pack = (exhaustive_scores(q.to(dtype), k.to(dtype), "shells") for q, k in both)
        closed = torch.full((9, 3, 64 - own.shape[-1]), -torch.inf, dtype=dtype)
        scores[dtype] = torch.cat([own, closed, pack], dim=-1)
    assert torch.equal(ids, scores[torch.float64].topk(4).indices)
    plain, exact = (scores[dtype].gather(-1, ids).softmax(-1) for dtype in (torch.float32, torch.float64))
    assert_within_budget(weights, plain, exact)
    assert layer.packs.num_experts == 64 + 25


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 30])
def test_results_do_not_depend_on_the_order_of_loading(count: int, backend: str) -> None:
    x, outputs = torch.randn(count, DIM), []
    for order in itertools.permutations("abc"):
        torch.manual_seed(0)
        layer = packed({}, backend=backend)
        for name in order:
            new_pack(layer, name, {"a": 9, "b": 25, "c": 25}[name], seed=ord(name))
            generator = torch.Generator().manual_seed(ord(name))
            layer.packs.by_name()[name].table.fill(lambda rows, generator=generator: rows.normal_(generator=generator))
        outputs.append(layer(x))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("length", [7, 20])
@pytest.mark.parametrize("backend", [*BACKENDS, "bag"])
@pytest.mark.parametrize("weighting", ["softmax", "none"])
@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8"])
def test_each_sequence_has_its_own_packs(row_format: str, weighting: str, backend: str, length: int) -> None:
    if backend == "bag" and row_format == "int8":
        pytest.skip("bag takes no int8 rows")
    torch.manual_seed(0)
    plain = packed({}, backend=backend, weighting=weighting, row_format=row_format)
    torch.manual_seed(0)
    layer = packed({"b": 25, "a": 9, "c": 25}, backend=backend, weighting=weighting, row_format=row_format)
    x = torch.randn(4, length, DIM)
    choice = [["a"], [], ["a", "c"], ["b", "c", "a"]]
    before, everything = plain(x), layer(x)
    with choose_packs(layer, choice):
        y = layer(x)
        _, ids = layer.packs(x, None, layer.product_keys)
        folded = layer(x.reshape(-1, DIM)).view_as(x)
    assert torch.equal(y[1], before[1])
    assert torch.equal(folded, y)
    assert torch.equal(layer(x), everything)
    query = layer.product_keys.query(x)
    for sequence, names in enumerate(choice):
        _, expected = union(layer, query[sequence], allowed=tuple(names))
        assert torch.equal(ids[sequence], expected)
    assert_within_budget(y[3], everything[3], definition(layer)(x.double())[3])
    assert not torch.allclose(y[2], everything[2], atol=1e-3)
    with choose_packs(layer, [[]]):
        assert torch.equal(layer(x), before)
    with choose_packs(layer, [["b"], []]):  # each list for two sequences
        twice = layer(x)
    with choose_packs(layer, [["b"], ["b"], [], []]):
        assert torch.equal(layer(x), twice)
