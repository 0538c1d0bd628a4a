import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlm.errors import UserError
from peerlm.evaluate import TextScore, score_text, score_tokens
from peerlm.evaluate.encoding import encode

NATS = torch.zeros(64).log_softmax(0)[0].neg().item()


class Recorder(torch.nn.Module):
    """A model that keeps the windows it is shown and finds every token as likely."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"max_position_embeddings": 1000})
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.windows = []

    def forward(self, input_ids):
        self.windows += input_ids.tolist()
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 64)})


def naive(model, tokens, context, stride):
    """Nats of tokens[1:], one forward pass for each, on the inputs that its window has up to there."""
    length = len(tokens) - 1
    nats = []
    for target in range(length):
        if target < context:
            begin = 0
        else:
            end = min(context + ((target - context) // stride + 1) * stride, length)
            begin = end - context
        with torch.no_grad():
            logits = model(input_ids=tokens[None, begin : target + 1]).logits[0, -1]
        nats.append(-logits.log_softmax(-1)[tokens[target + 1]])
    return torch.stack(nats)


@pytest.mark.parametrize(
    ("length", "context", "stride", "batch_size"),
    [
        (2, 8, 4, 2),
        (8, 8, 4, 2),
        (9, 8, 4, 2),
        (10, 8, 4, 2),
        (40, 8, 4, 3),
        (41, 8, 8, 3),
        (23, 7, 3, 16),
        (12, 5, 1, 4),
    ],
)
def test_windows_give_what_one_token_at_a_time_gives(model, length, context, stride, batch_size):
    tokens = torch.randint(300, (length,))
    nats = score_tokens(model, tokens, context=context, stride=stride, batch_size=batch_size)
    torch.testing.assert_close(nats, naive(model, tokens, context, stride), rtol=1e-9, atol=1e-9)


@given(length=st.integers(1, 60), context=st.integers(2, 20), data=st.data())
def test_every_token_is_scored_once_with_its_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    batch_size = data.draw(st.integers(1, 5))
    model, done = Recorder(), []
    tokens = torch.arange(length)
    nats = score_tokens(
        model,
        tokens,
        context=context,
        stride=stride,
        batch_size=batch_size,
        report=lambda scored, total: done.append((scored, total)),
    )
    assert nats.shape == (length - 1,)
    assert torch.equal(nats, torch.full_like(nats, NATS))  # every one was written
    assert all(len(window) <= context and window == list(range(window[0], window[-1] + 1)) for window in model.windows)
    covered = 0
    for window in model.windows:  # the first window that reaches a target scores it
        for position in range(covered, window[-1] + 1):
            assert position - window[0] + 1 >= min(position + 1, context - stride + 1)
        covered = window[-1] + 1
    assert covered == length - 1
    assert [total for _, total in done] == [length - 1] * len(done)
    assert [scored for scored, _ in done] == sorted(scored for scored, _ in done)
    assert not done or done[-1][0] == length - 1


def test_scoring_leaves_the_training_mode_of_each_submodule(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        nats = score_tokens(model, torch.arange(9), context=4, stride=2)
        assert [module.training for module in model.modules()] == modes
        assert not nats.requires_grad
    finally:
        model.eval()
    assert torch.equal(nats, score_tokens(model, torch.arange(9), context=4, stride=2))


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (1, 1, "context is 1; a window needs at least 2"),
        (8, 9, "stride is 9; it must be 1 to the context, 8"),
        (8, 0, "stride is 0"),
        (65, 8, "context is 65, but this model reads at most 64"),
    ],
)
def test_impossible_windows_are_named(model, tokenizer, context, stride, message):
    with pytest.raises(UserError, match=message):
        score_tokens(model, torch.arange(9), context=context, stride=stride)
    with pytest.raises(UserError, match=message):
        score_text(model, tokenizer, "text", context=context, stride=stride)


def test_a_text_is_its_tokens_after_an_end_of_text_token(model, tokenizer):
    text = "The keeper lit a naïve lamp.\nNobody  answered."
    tokens = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    score = score_text(model, tokenizer, text, context=64)
    nats = naive(model, tokens, 64, 32).sum().item()
    assert (score.tokens, score.bytes, score.words) == (len(tokens) - 1, len(text.encode()), 8)
    assert score.nats == pytest.approx(nats)
    assert score.perplexity == pytest.approx(math.exp(nats / (len(tokens) - 1)))
    assert score.word_perplexity == pytest.approx(math.exp(nats / 8))
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()))


def test_documents_are_read_in_sequence_and_their_ends_not_scored(model, tokenizer):
    documents = ["The keeper.", "", "Nobody answered the door."]
    ids = [tokenizer(document)["input_ids"] for document in documents]
    end = tokenizer.eos_token_id
    tokens = torch.tensor([end, *ids[0], end, *ids[2]])
    nats = naive(model, tokens, 16, 4)
    score = score_text(model, tokenizer, documents, context=16, stride=4)
    assert score.tokens == len(ids[0]) + len(ids[2])
    assert score.bytes == len("".join(documents))
    assert score.nats == pytest.approx(nats.sum().item() - nats[len(ids[0])].item())


def test_stride_is_half_the_context_by_default(model, tokenizer):
    text = "The old keeper climbed the stairs. " * 4
    assert score_text(model, tokenizer, text, context=8) == score_text(model, tokenizer, text, context=8, stride=4)


def test_limit_scores_the_start_alone(model, tokenizer):
    documents = ["The keeper lit the lamp.", "Nobody answered the door."]
    first = len(tokenizer(documents[0])["input_ids"])
    half = score_text(model, tokenizer, documents, context=64, limit=first)
    assert half == score_text(model, tokenizer, documents[0], context=64)
    assert score_text(model, tokenizer, documents, context=64, limit=first + 2).tokens == first + 2
    assert score_text(model, tokenizer, documents, context=64, limit=10**9).tokens > first + 2


def test_limit_reads_no_further_than_it_must(tokenizer):
    def documents():
        yield "The keeper lit the lamp."
        raise AssertionError("read on")

    assert encode(tokenizer, documents(), limit=3).tokens.shape == (4,)


@given(text=st.text(min_size=1, max_size=30), data=st.data())
def test_the_bytes_of_a_cut_text_are_those_of_its_whole_characters(tokenizer, text, data):
    ids = tokenizer(text)["input_ids"]
    limit = data.draw(st.integers(1, len(ids)))
    try:
        encoded = encode(tokenizer, [text], limit=limit)
    except UserError:
        assert not tokenizer.decode(ids[:limit]).strip("\ufffd").split()
        return
    assert encoded.tokens.tolist() == [tokenizer.eos_token_id, *ids[:limit]]
    assert encoded.scored.tolist() == [False] + [True] * limit
    whole = tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False)
    assert text.startswith(whole.rstrip("\ufffd")) or "\ufffd" in text
    assert encoded.bytes <= len(text.encode())
    if "\ufffd" not in whole:
        assert encoded.bytes == len(whole.encode())


def test_special_tokens_spelled_out_in_a_text_are_text(tokenizer):
    encoded = encode(tokenizer, ["a <|endoftext|> b"])
    assert tokenizer.eos_token_id not in encoded.tokens[1:]
    assert encoded.bytes == len("a <|endoftext|> b")


@pytest.mark.parametrize("documents", ["", " \n", [], ["", "  "]])
def test_a_text_without_words_is_refused(model, tokenizer, documents):
    with pytest.raises(UserError, match="no words; give"):
        score_text(model, tokenizer, documents, context=8)


def test_a_limit_without_words_is_named(model, tokenizer):
    with pytest.raises(UserError, match="no words in its first 1 tokens"):
        score_text(model, tokenizer, "\n\nThe", context=8, limit=1)
    with pytest.raises(UserError, match="limit is 0 tokens"):
        score_text(model, tokenizer, "The", context=8, limit=0)


def test_more_than_a_float_holds_is_infinite():
    score = TextScore(tokens=1000, bytes=3000, words=1, nats=8000.0)
    assert score.word_perplexity == math.inf
    assert score.perplexity == pytest.approx(math.exp(8))
