"""Lower blocks that are remembered: bits and gradients are those of whole passes, and the file goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.continual.lower_blocks import FILE, forget_lower_blocks, lower_blocks_of, remember_lower_blocks
from peerlm.convert.ffws import find_ffws
from peerlm.packs.api import new_pack, pack_parameters

from ..models import build

WINDOWS = torch.randint(1, 64, (3, 4, 12), generator=torch.Generator().manual_seed(0))


def taught(family: str) -> tuple[PreTrainedModel, list[int]]:
    """A frozen model with a pack beside its last layer, and how often each block has run."""
    model = build(family).requires_grad_(False)
    paths = new_pack(model, "law", 16, layers=[find_ffws(model)[-1].path])
    for parameter in pack_parameters(model, "law"):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert lower_blocks_of(model, paths) == 2
    runs = [0, 0, 0]
    blocks: Any = next(each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == 3)
    for number, block in enumerate(blocks):
        attention = next(each for name, each in block.named_children() if "att" in name)

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        attention.register_forward_hook(count)
    return model, runs


def step(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The loss, and the gradients of the pack."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in pack_parameters(model, "law"))]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3", "gpt2", "opt"])
def test_a_second_epoch_skips_the_lower_blocks_and_keeps_bits_and_gradients(family: str, tmp_path: Path) -> None:
    plain, _ = taught(family)
    model, runs = taught(family)
    remember_lower_blocks(model, 2, tmp_path, windows=12)
    for epoch in range(3):
        for ids in WINDOWS:
            expected = step(plain, ids)
            assert all(map(torch.equal, step(model, ids), expected))
        assert runs == [3, 3, 3 * (epoch + 1)]
    assert (tmp_path / FILE).stat().st_size == 12 * 12 * 16 * 4
    forget_lower_blocks(model)
    assert not list(tmp_path.iterdir())
    assert all(map(torch.equal, step(model, WINDOWS[0]), step(plain, WINDOWS[0])))
    assert runs[0] == 4


def test_windows_in_another_order_and_batch_are_known(tmp_path: Path) -> None:
    model, runs = taught("llama")
    remember_lower_blocks(model, 2, tmp_path, windows=12)
    plain, _ = taught("llama")
    for ids in WINDOWS:
        step(model, ids)
    other = WINDOWS.flatten(0, 1)[[7, 0, 11]]
    for found, expected in zip(step(model, other), step(plain, other), strict=True):
        torch.testing.assert_close(found, expected)
    assert runs[0] == 3


@pytest.mark.parametrize("options", [{"use_cache": True}, {"attention_mask": torch.ones(4, 12, dtype=torch.long)}])
def test_passes_that_depend_on_more_than_tokens_run_whole(options: dict[str, Any], tmp_path: Path) -> None:
    model, runs = taught("llama")
    remember_lower_blocks(model, 2, tmp_path, windows=12)
    step(model, WINDOWS[0])
    with torch.no_grad():
        model(input_ids=WINDOWS[0], **options)
    assert runs == [2, 2, 2]


def test_more_windows_than_there_is_room_for_are_computed(tmp_path: Path) -> None:
    model, runs = taught("llama")
    remember_lower_blocks(model, 2, tmp_path, windows=4)
    for _ in range(2):
        for ids in WINDOWS[:2]:
            step(model, ids)
    assert runs == [3, 3, 4]


def test_a_pass_that_fails_leaves_the_blocks_as_they_were(tmp_path: Path) -> None:
    model, _ = taught("llama")
    remember_lower_blocks(model, 2, tmp_path, windows=4)
    step(model, WINDOWS[0])
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=WINDOWS[0], labels=WINDOWS[1][:2], use_cache=False)
    assert not any("forward" in vars(module) for module in model.modules())
