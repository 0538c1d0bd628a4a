"""What a model copies: against a copier, a loop over windows, and attention that is even."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peerlm.errors import UserError
from peerlm.evaluate import CopyCounts, copy_probe, evaluate, held_out_loss
from peerlm.evaluate.attention import first_token_attention
from peerlm.evaluate.copying import random_repeats, repeated, repeated_losses
from peerlm.evaluate.likelihood import last_logits, token_nats
from peerlm.layers.modes import evaluating
from peerlm.model import PeerForCausalLM
from peerlm.ranks import Ranks


class Copier(nn.Module):
    """Foretells the token that followed the last place of the present token, and nothing elsewhere."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=vocab_size)
        self.config = SimpleNamespace(get_text_config=lambda: text, eos_token_id=0, bos_token_id=None)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.config.get_text_config().vocab_size)
        for row, tokens in enumerate(input_ids.tolist()):
            for place, token in enumerate(tokens):
                earlier = [before for before in range(place) if tokens[before] == token]
                if earlier:
                    logits[row, place, tokens[earlier[-1] + 1]] = 50.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("begin", [(), (7, 8)])
def test_a_copier_knows_the_second_half(begin):
    first, second = repeated_losses(Copier(5000), 17, begin=begin)
    assert first == pytest.approx(torch.tensor(5000.0).log().item(), abs=0.5)  # by chance a token meets itself
    assert second < 1.0 < first


def test_random_tokens_stand_twice_and_have_no_meaning():
    tokens = random_repeats(Copier(6).config, 12, begin=(3,), seed=0)
    assert tokens.shape == (16, 11)
    assert torch.equal(tokens[:, 1:6], tokens[:, 6:])
    assert set(tokens[:, 1:].flatten().tolist()) == {1, 2, 4, 5}
    assert torch.equal(tokens, random_repeats(Copier(6).config, 12, begin=(3,), seed=0))
    with pytest.raises(UserError, match="at least 5 tokens, not of 4"):
        random_repeats(Copier(6).config, 4, begin=(3,), seed=0)


def test_targets_repeat_as_a_loop_finds_them():
    windows = torch.randint(3, (20, 30), generator=torch.Generator().manual_seed(0))
    found = repeated(windows)
    for row, tokens in enumerate(windows.tolist()):
        seen: set[tuple[int, ...]] = set()
        for place in range(1, 30):
            triple = tuple(tokens[place - 2 : place + 1]) if place >= 2 else ()
            assert found[row, place - 1] == (triple in seen)
            seen |= {triple} - {()}
    assert 0 < found.double().mean() < 1
    assert not repeated(torch.zeros(2, 3, dtype=torch.int64)).any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("limit", [None, 5])
def test_counts_are_those_of_a_loop(model, limit):
    windows = torch.randint(4, (7, 12), generator=torch.Generator().manual_seed(1))
    counts = CopyCounts(windows, limit=limit, device=torch.device("cpu"))
    loss = held_out_loss(model, windows, batch_size=2, limit=limit, watch=counts.add)
    assert loss == held_out_loss(model, windows, batch_size=2, limit=limit)
    windows = windows[:limit]
    with evaluating(model):
        nats = token_nats(last_logits(model, windows[:, :-1], 11), windows[:, 1:])
    again = repeated(windows)
    order = again.double().mean(1).argsort(stable=True)
    poor, rich = order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]
    figures = counts.figures()
    assert figures["poor"] == pytest.approx(nats[poor].mean().item())
    assert figures["rich"] == pytest.approx(nats[rich].mean().item())
    assert figures["poor_share"] == pytest.approx(again[poor].double().mean().item())
    assert figures["rich_share"] == pytest.approx(again[rich].double().mean().item())
    assert figures["repeats"] == pytest.approx(nats[again].mean().item())
    assert figures["others"] == pytest.approx(nats[~again].mean().item())
    ranges = {"1": slice(0, 1), "2-3": slice(1, 3), "4-7": slice(3, 7), "8-11": slice(7, 11)}
    assert figures["by_position"] == {name: pytest.approx(nats[:, part].mean().item()) for name, part in ranges.items()}


def test_one_window_without_repeats_has_no_rich_half(model):
    counts = CopyCounts(torch.arange(8)[None], limit=None, device=torch.device("cpu"))
    held_out_loss(model, torch.arange(8)[None], batch_size=2, watch=counts.add)
    figures = counts.figures()
    assert (figures["rich"], figures["rich_share"], figures["repeats"]) == (None, None, None)
    assert figures["poor"] == pytest.approx(figures["others"])


def test_surplus_windows_of_a_rank_do_not_count(model):
    """Rank 1 of 2 reads window 1 of 3, and a surplus one that only keeps step with the other rank."""
    windows = torch.randint(300, (3, 8))
    counts = CopyCounts(windows, limit=None, device=torch.device("cpu"))
    ranks = Ranks(rank=1, world_size=2, device=torch.device("cpu"))
    object.__setattr__(ranks, "total", lambda value: value)
    held_out_loss(model, windows, batch_size=1, ranks=ranks, watch=counts.add)
    alone = CopyCounts(windows[1:2], limit=None, device=torch.device("cpu"))
    held_out_loss(model, windows[1:2], batch_size=1, watch=alone.add)
    assert counts.figures()["by_position"] == alone.figures()["by_position"]


def test_attention_to_the_first_token_of_even_attention(model):
    even = copy.deepcopy(model)
    with torch.no_grad():
        even.model.layers[1].self_attn.q_proj.weight.zero_()
    before = even.config._attn_implementation
    shares = first_token_attention(even, torch.randint(300, (3, 9)))
    assert shares is not None
    assert list(shares) == ["0", "1"]
    assert shares["1"] == pytest.approx(sum(1 / (place + 1) for place in range(1, 9)) / 8)
    assert shares["0"] != pytest.approx(shares["1"])
    assert even.config._attn_implementation == before != "eager"


def test_a_probe_and_a_row_of_eval_have_every_figure(saved, model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the door, " * 60)
    row = evaluate(saved, [path], context=16, copying=True, progress=False)[str(path)]["copying"]
    assert 1 >= row["rich_share"] >= row["poor_share"] > 0
    windows = torch.randint(300, (2, 16))
    assert copy_probe(model, windows)["second_half"] == pytest.approx(row["second_half"])
    assert set(row["first_token"]) == {"0", "1"}
    with pytest.raises(UserError, match=r"whole windows of 64 tokens, and 6 of text\.txt are read"):
        evaluate(saved, [path], context=64, copying=True, limit=5, progress=False)


def test_a_model_whose_attention_was_measured_is_pickled_and_measured_again(model: PeerForCausalLM) -> None:
    text = torch.randint(300, (2, 8))
    first = first_token_attention(model, text)
    again = first_token_attention(pickle.loads(pickle.dumps(model)), text)
    assert first == again == first_token_attention(model, text)
    assert first is not None
