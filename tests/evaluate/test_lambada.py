import math

import pytest
import torch

from peerlm.data.tokenizer import encoder
from peerlm.errors import UserError
from peerlm.evaluate import score_last_words
from peerlm.evaluate.lambada import split_tokens
from peerlm.usage import record_usage

PASSAGES = [
    ("The old keeper climbed the stairs and lit the", "lamp"),
    ("Nobody answered the", "door"),
    ("Nobody answered, so he went", "home"),
    ("12 apples: that was", "Zanzibar"),
    ("The", "keeper"),
]


def naive(model, tokenizer, passage, context):
    """Nats of the last word and whether greedy decoding finds it, token by token."""
    before = tokenizer(passage[0])["input_ids"]
    word = tokenizer(" " + passage[1])["input_ids"]
    assert tokenizer(" ".join(passage))["input_ids"] == before + word
    read = ([tokenizer.eos_token_id, *before, *word][-context - 1 :])[: -len(word)]
    nats, greedy = 0.0, True
    for token in word:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([read])).logits[0, -1]
        nats -= logits.log_softmax(-1)[token].item()
        greedy &= logits.argmax().item() == token
        read.append(token)
    return nats, greedy


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("context", [64, 9])
def test_batches_give_what_one_token_at_a_time_gives(model, tokenizer, batch_size, context):
    done = []
    score = score_last_words(
        model,
        tokenizer,
        PASSAGES,
        context=context,
        batch_size=batch_size,
        report=lambda passages, total: done.append((passages, total)),
    )
    expected = [naive(model, tokenizer, passage, context) for passage in PASSAGES]
    assert score.passages == len(PASSAGES)
    assert score.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-9)
    assert score.correct == sum(greedy for _, greedy in expected)
    assert score.perplexity == pytest.approx(math.exp(score.nats / 5))
    assert score.accuracy == score.correct / 5
    lengths = [len(tokenizer(" ".join(passage))["input_ids"]) for passage in PASSAGES]
    assert score.truncated == sum(length > context for length in lengths)
    assert done[-1] == (5, 5)


class Follower(torch.nn.Module):
    """Predicts after token t the token successors[t]."""

    def __init__(self, successors):
        super().__init__()
        self.config = None
        self.successors = torch.nn.Parameter(torch.zeros(300, 300))
        for before, after in successors.items():
            self.successors.data[before, after] = 5

    def forward(self, input_ids, attention_mask=None):
        return type("Output", (), {"logits": self.successors[input_ids]})


def test_a_word_is_right_when_all_its_tokens_are(tokenizer):
    before = tokenizer("Nobody answered the")["input_ids"]
    word = tokenizer(" jumbo")["input_ids"]
    assert len({before[-1], *word}) == len(word) + 1 > 2
    steps = list(zip([before[-1], *word], word, strict=False))
    passages = [("Nobody answered the", "jumbo")]
    right = score_last_words(Follower(dict(steps)), tokenizer, passages, context=64)
    wrong = score_last_words(Follower(dict(steps[:-1])), tokenizer, passages, context=64)
    assert (right.accuracy, wrong.accuracy) == (1, 0)
    assert right.nats < wrong.nats


def test_padding_is_not_counted_as_use_of_experts(model, tokenizer):
    with record_usage(model) as usage:
        score_last_words(model, tokenizer, PASSAGES, context=64, batch_size=5)
    (recorded,) = usage.values()
    read = sum(len(tokenizer(" ".join(passage))["input_ids"]) for passage in PASSAGES)
    assert recorded.retrievals_N.sum() == read * 2 * 4


def test_spaces_around_the_boundary_make_no_difference(tokenizer):
    engine = encoder(tokenizer)
    expected = split_tokens(engine, "lit the", "lamp")
    assert split_tokens(engine, "lit the ", " lamp ") == expected
    assert expected[0] + expected[1] == tokenizer("lit the lamp")["input_ids"]


def test_a_token_across_the_boundary_is_split_there():
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 0, " ": 1, "b": 2, "a ": 3, " b": 4}
    engine = Tokenizer(models.BPE(vocabulary, [("a", " "), (" ", "b")]))
    assert engine.encode("a b").ids == [3, 2]
    assert split_tokens(engine, "a", "b") == ([0], [4])


def test_limit_stops_after_the_passage_that_reaches_it(model, tokenizer):
    first = len(tokenizer(" ".join(PASSAGES[0]))["input_ids"])
    for limit, passages in [(1, 1), (first, 1), (first + 1, 2), (10**6, 5)]:
        assert score_last_words(model, tokenizer, PASSAGES, context=64, limit=limit).passages == passages


@pytest.mark.parametrize(
    ("passages", "options", "message"),
    [
        ([], {}, "no passages to score"),
        ([("The", "lamp"), ("The", "Zanzibar")], {"context": 4}, "continuation of passage 2 has . tokens"),
        ([("The", "lamp")], {"limit": 0}, "limit is 0 tokens"),
        ([("The", "lamp")], {"context": 65}, "context is 65, but this model reads at most 64"),
    ],
)
def test_what_cannot_be_scored_is_named(model, tokenizer, passages, options, message):
    with pytest.raises(UserError, match=message):
        score_last_words(model, tokenizer, passages, **{"context": 64, **options})
