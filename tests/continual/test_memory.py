"""What keeps a model to what it knows: the order of the memory, and the divergence, against other ways to say them."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from peerlm.continual.memory import Memory, divergence, replayed
from peerlm.data import window_order
from peerlm.model import PeerForCausalLM

LONG, SHORT = torch.arange(0, 20).view(10, 2), torch.arange(100, 108).view(4, 2)


def test_texts_take_turns_and_every_epoch_has_each_window_once() -> None:
    memory = Memory([(LONG, None), (SHORT, None)], seed=3)
    drawn = memory.draw(0, 40)
    assert drawn.shape == (40, 2)
    assert (drawn[0::2, 0] < 100).all()
    assert (drawn[1::2, 0] >= 100).all()
    assert Counter(drawn[0::2, 0].tolist()) == Counter(2 * LONG[:, 0].tolist())
    assert Counter(drawn[1::2, 0].tolist()) == Counter(5 * SHORT[:, 0].tolist())
    assert drawn[1:9:2, 0].tolist() != drawn[9:17:2, 0].tolist()  # epochs differ
    torch.testing.assert_close(memory.draw(7, 9), drawn[7:9])


def test_what_is_remembered_is_what_a_stage_read_first() -> None:
    memory = Memory([(LONG, 3)], seed=5)
    read_first = {window_order(place, 10, 5, 0) * 2 for place in range(3)}
    assert set(memory.draw(0, 9)[:, 0].tolist()) == read_first


def test_replayed_windows_follow_one_another() -> None:
    places = [replayed(step, 0.3) for step in range(20)]
    assert [stop for _, stop in places[:-1]] == [start for start, _ in places[1:]]
    assert places[-1][1] == 6
    assert max(stop - start for start, stop in places) == 1


def test_divergence_is_that_of_the_definition_and_moves_the_new_model_alone(texts: Path) -> None:
    before, now = (PeerForCausalLM.from_pretrained(texts / "peer").double().eval() for _ in range(2))
    with torch.no_grad():
        for parameter in now.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(300, (3, 7))
    found = divergence(now, before, ids)
    p, q = (model(ids).logits[:, :-1].softmax(-1) for model in (before, now))
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    assert found > 0
    assert divergence(before, before, ids).abs() < 1e-12
    found.backward()
    assert all(parameter.grad is None for parameter in before.parameters())
    assert now.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("places", [(0, 1), (5, 8)])
def test_the_seed_decides_the_order(places: tuple[int, int]) -> None:
    one, same, other = (Memory([(torch.arange(2000).view(1000, 2), None)], seed).draw(*places) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
