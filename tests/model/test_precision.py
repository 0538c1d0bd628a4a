"""The language model in the dtypes that it is used in: native kernels, bfloat16, recomputation."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peerlm.model import FFW_KINDS, PeerForCausalLM
from peerlm.testing import assert_within_budget, definition, float64

Build = Callable[..., PeerForCausalLM]


def draw_tokens(*shape: int) -> Tensor:
    return torch.randint(1, 64, shape)


def results(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of the loss by name."""
    out = model(ids, labels=ids)
    out.loss.backward()
    return {"logits": out.logits} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", FFW_KINDS)
def test_float32_errs_no_more_than_the_definition(tiny_model: Build, kind: str) -> None:
    model, ids = tiny_model(ffw_layers=kind).eval(), draw_tokens(4, 16)
    plain, judge = definition(model, None), definition(model)
    with float64():
        exact = results(judge, ids)
    assert_within_budget(results(model, ids), results(plain, ids), exact)


@pytest.mark.parametrize("kind", FFW_KINDS)
def test_bfloat16(tiny_model: Build, kind: str) -> None:
    model, ids = tiny_model(ffw_layers=kind), draw_tokens(2, 9)
    half = copy.deepcopy(model).bfloat16()
    out = half(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=2 * torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Reentrant checkpointing (not the default) hides the balance loss of token choice from autograd.
@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [(kind, False) for kind in FFW_KINDS] + [("dense", True), ("peer", True), ("pkm", True)],
)
def test_gradient_checkpointing_changes_nothing(tiny_model: Build, kind: str, reentrant: bool) -> None:
    model, ids = tiny_model(ffw_layers=kind).double(), draw_tokens(2, 9)
    plain = copy.deepcopy(model)
    # transformers renamed it after 5.20, the last release for Python 3.10
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    losses = [m(ids, labels=ids, use_cache=False).loss for m in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (name, parameter), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
@pytest.mark.parametrize("kind", FFW_KINDS)
def test_a_model_compiles_without_graph_breaks_where_it_says_so(tiny_model: Build, kind: str) -> None:
    model, ids = tiny_model(ffw_layers=kind, num_hidden_layers=1), draw_tokens(2, 9)
    with torch.no_grad():
        model(ids)  # running statistics are not the initial ones
    model.eval()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        if model._can_compile_fullgraph:
            found, plain = (call(ids, attention_mask=mask).logits[mask.bool()] for call in (compiled, model))
            judge = definition(model)
            with float64():
                exact = judge(ids, attention_mask=mask).logits[mask.bool()]
            assert_within_budget(found, plain, exact)
        else:
            assert kind == "expert_choice"
            assert not model._supports_context_parallel
            with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                compiled(ids, attention_mask=mask)
    torch._dynamo.reset()
