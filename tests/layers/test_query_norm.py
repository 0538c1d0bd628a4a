"""QueryBatchNorm against torch's BatchNorm1d on the rows that count."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peerlm.layers import QueryBatchNorm
from peerlm.testing import assert_within_budget


def pair(features: int) -> tuple[QueryBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's in float64, with the same random affine map and running statistics."""
    ours, theirs = QueryBatchNorm(features).double(), nn.BatchNorm1d(features).double()
    with torch.no_grad():
        for tensor in (ours.weight, ours.bias, ours.running_mean):
            tensor.normal_()
        ours.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def assert_same_statistics(ours: QueryBatchNorm, theirs: nn.BatchNorm1d) -> None:
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("masked", [False, True])
def test_training_equals_batch_norm_of_the_rows_that_count(masked: bool) -> None:
    ours, theirs = pair(3)
    x = (2 * torch.randn(9, 3, dtype=torch.float64) + 5).requires_grad_()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool) if masked else None
    counted = mask if mask is not None else torch.ones(9, dtype=torch.bool)
    coefficients = torch.randn(int(counted.sum()), 3, dtype=torch.float64)

    out = ours(x, mask)[counted]
    expected = theirs(x[counted])
    torch.testing.assert_close(out, expected)
    assert_same_statistics(ours, theirs)
    gradients = torch.autograd.grad((out * coefficients).sum(), [x, ours.weight, ours.bias])
    expected_gradients = torch.autograd.grad((expected * coefficients).sum(), [x, theirs.weight, theirs.bias])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_rows_that_do_not_count_are_normalised_all_the_same() -> None:
    ours, _ = pair(3)
    x, mask = torch.randn(4, 3, dtype=torch.float64), torch.tensor([True, True, True, False])
    statistics = x[:3].var(dim=0, correction=0), x[:3].mean(dim=0)
    expected = (x[3] - statistics[1]) / (statistics[0] + ours.eps).sqrt() * ours.weight + ours.bias
    torch.testing.assert_close(ours(x, mask)[3], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_a_mask_of_real_tokens_alone_changes_nothing(training: bool, dtype: torch.dtype) -> None:
    """With a mask statistics are our own sums, without one PyTorch's."""
    masked = pair(5)[0].to(dtype).train(training)
    plain, exact = copy.deepcopy(masked), copy.deepcopy(masked).double()
    drawn = (3 * torch.randn(301, 5) + 7).to(dtype)
    coefficients = torch.randn(301, 5, dtype=dtype)
    outcomes = []
    for layer, mask in ((masked, torch.ones(301, dtype=torch.bool)), (plain, None), (exact, None)):
        x = drawn.to(layer.weight.dtype).requires_grad_()
        out = layer(x, mask)
        gradients = torch.autograd.grad((out * coefficients).sum(), [x, layer.weight, layer.bias])
        outcomes.append([out, *gradients, layer.running_mean, layer.running_var])
    if dtype == torch.float64:
        torch.testing.assert_close(*outcomes[:2])
    else:
        assert_within_budget(*outcomes)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    ours, _ = pair(2)
    mask = torch.tensor([True, False, True, True]) if masked else None
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ours(x, mask), (x,))


def test_evaluation_uses_and_keeps_the_running_statistics() -> None:
    ours, theirs = (module.eval() for module in pair(3))
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert_same_statistics(ours, theirs)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_than_two_tokens_that_count_use_the_running_statistics(rows: int) -> None:
    ours, _ = pair(3)
    mask = torch.tensor([True, False, False])[:rows]
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(ours.state_dict())
    out = ours(x, mask)
    torch.testing.assert_close(out, copy.deepcopy(ours).eval()(x))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_statistics_of_bfloat16_rows_are_float32() -> None:
    norm = QueryBatchNorm(4)
    x = (torch.randn(512, 4) + 100).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean(dim=0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    ours, _ = pair(3)
    plain = copy.deepcopy(ours)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    checkpoint(ours, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert torch.equal(ours.running_mean, plain.running_mean)
    assert torch.equal(ours.running_var, plain.running_var)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("half", ["weight", "statistics"])
def test_weights_and_statistics_may_differ_in_dtype(half: str, training: bool) -> None:
    """As where an adapter's parameters alone are cast to float32 beside a model in bfloat16."""
    norm = pair(3)[0].float().train(training)
    tensors = (norm.weight, norm.bias) if half == "weight" else (norm.running_mean, norm.running_var)
    for tensor in tensors:
        tensor.data = tensor.data.bfloat16()

    def by_formula(x: Tensor) -> Tensor:
        running = (norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype))
        mean, var = (x.mean(dim=0), x.var(dim=0, correction=0)) if training else running
        return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias

    x = torch.randn(7, 3)
    plain, exact = by_formula(x), by_formula(x.double())
    assert_within_budget(norm(x), plain, exact)
