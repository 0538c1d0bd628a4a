"""Gradients of a step: the number of micro-batches changes nothing."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.train.step import accumulate_gradients


class Bigrams(nn.Module):
    """Stands in for a language model: next token from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(7, 7, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(
            loss=F.cross_entropy(self.logits[input_ids[:, :-1]].flatten(0, 1), labels[:, 1:].flatten())
        )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 9])
def test_any_micro_batch_gives_loss_and_gradients_of_the_mean(micro_batch_size: int) -> None:
    model, ids = Bigrams(), torch.randint(7, (5, 4))
    expected = model(ids, ids, use_cache=False).loss
    (gradient,) = torch.autograd.grad(expected, [model.logits])
    loss = accumulate_gradients(model, ids, micro_batch_size=micro_batch_size)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(model.logits.grad, gradient)


def test_gradients_of_the_step_before_are_gone() -> None:
    model, ids = Bigrams(), torch.randint(7, (4, 4))
    accumulate_gradients(model, ids, micro_batch_size=2)
    first = model.logits.grad.clone()
    accumulate_gradients(model, ids, micro_batch_size=2)
    assert torch.equal(model.logits.grad, first)
