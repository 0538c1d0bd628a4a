"""Random shapes and settings of operators whose other tests name theirs, against the definition in float64."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peerlm.ops import api
from peerlm.ops.functions import WEIGHTINGS
from peerlm.ops.pairing import PAIRINGS
from peerlm.ops.triton import row_steps
from peerlm.optim import row_step
from peerlm.testing import assert_within_budget, exhaustive_scores, exhaustive_search

from ...row_tables import KINDS, assert_alike, copy_of, random_table, step_of, twins
from .placed_tables import placed_on, read_back

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = settings(max_examples=12)


@given(
    tokens=st.integers(1, 4),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    n=st.integers(1, 20),
    half=st.integers(1, 12),
    k=st.integers(1, 6),
    weighting=st.sampled_from(sorted(WEIGHTINGS)),
    pairing=st.sampled_from(sorted(PAIRINGS)),
    seed=st.integers(0, 1000),
)
@FEW
def test_retrieval_and_its_gradients(
    tokens: int, heads: int, shared: bool, n: int, half: int, k: int, weighting: str, pairing: str, seed: int
) -> None:
    torch.manual_seed(seed)
    k = min(k, n)
    leaves = [
        torch.randn(tokens, heads, 2 * half, device=DEVICE).requires_grad_(),
        torch.randn(2, 1 if shared else heads, n, half, device=DEVICE).mul(half**-0.5).requires_grad_(),
    ]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    weights, ids = api.retrieve(*leaves, k, weighting=weighting, pairing=pairing, backend="triton")
    assert torch.equal(ids.cpu(), exhaustive_search(*(leaf.detach().cpu() for leaf in leaves), k, pairing)[0])
    plain, exact = (WEIGHTINGS[weighting](exhaustive_scores(*of, pairing).gather(-1, ids)) for of in (leaves, wide))
    coefficients = torch.randn(tokens, heads, k, device=DEVICE)
    assert_within_budget(
        *(
            (found.detach(), *torch.autograd.grad((found * coefficients).sum(), of))
            for found, of in ((weights, leaves), (plain, leaves), (exact, wide))
        )
    )


@given(
    tokens=st.integers(0, 4),
    per_token=st.integers(1, 20),
    dim=st.integers(1, 40),
    num_rows=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    row_gradients=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(2, 3, 33, 4, torch.bfloat16, True, 0)
@example(1, 1, 1, 1, torch.float16, True, 0)
@FEW
def test_values_and_their_gradients(
    tokens: int, per_token: int, dim: int, num_rows: int, dtype: torch.dtype, row_gradients: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    stored = torch.randn(num_rows, dim, device=DEVICE).to(dtype)
    x, weights = torch.randn(tokens, dim, device=DEVICE), torch.rand(tokens, per_token, device=DEVICE)
    ids = torch.randint(num_rows, (tokens, per_token), device=DEVICE)

    def results(backend: str, wide: bool) -> list[torch.Tensor]:
        given = (x, weights, stored, stored)  # rows twice: PyTorch adds no sparse gradients in float16
        leaves = [(each.double() if wide else each).detach().clone().requires_grad_() for each in given]
        token, weight, mixed_rows, dotted_rows = leaves
        mixed = api.mix_values(weight, ids, mixed_rows, backend=backend, row_gradients=row_gradients)
        dots = api.dot_values(token, ids, dotted_rows, backend=backend, row_gradients=row_gradients)
        gradients = torch.autograd.grad((mixed.square().sum() + dots.square().sum()).to(torch.float32), leaves)
        return [mixed.detach(), dots.detach(), *(each.to_dense() for each in gradients)]

    found, plain, exact = results("triton", False), results("reference", False), results("reference", True)
    assert_within_budget(found, plain, exact)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    parts=st.integers(1, 3),
    width=st.integers(1, 40),
    ids=st.sets(st.integers(0, 39), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
@FEW
def test_steps_of_rows(kind: str, parts: int, width: int, ids: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    found, expected = twins(random_table((parts, width), **KINDS[kind]))
    exact, found = copy_of(found, torch.float64), placed_on(DEVICE, found)
    rows, gradient = torch.tensor(sorted(ids)), torch.randn(len(ids), parts, width).to(found.rows.dtype)
    row_steps.update_rows(found, rows.to(DEVICE), gradient.to(DEVICE), step_of(found))
    for table in (expected, exact):
        row_step.update_rows(table, rows, gradient.to(table.rows.dtype), step_of(table))
    assert_alike(read_back(found), expected, exact)
