"""Models whose documents begin with a token of their own, against plain loops over transformers' model."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from peerlm.errors import PeerlmWarning, UserError
from peerlm.evaluate import evaluate, load_model, sample_text, score_last_words, score_text
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.likelihood import score_endings
from peerlm.evaluate.perplexity import score_documents
from peerlm.evaluate.sample import prompt_ids
from peerlm.evaluate.windows import begin_windows, text_windows
from peerlm.marks import document_marks, marks_of
from peerlm.testing import float64

pytestmark = pytest.mark.usefixtures("float64")

DOCUMENTS = ["river lantern moss", "quiet copper ladder winter orchard", "tin"]
LONG = "river lantern moss quiet copper ladder winter orchard signal paper harbour tin violet " * 3
CONTEXT = 16


def new_model(vocab_size: int, **config) -> LlamaForCausalLM:
    """A Llama in float64 whose predictions depend much on what it reads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = LlamaConfig(
        vocab_size=vocab_size,
        **sizes,
        max_position_embeddings=64,
        initializer_range=0.5,
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **config},
    )
    with float64():
        return LlamaForCausalLM(settings).eval()


@pytest.fixture(scope="module")
def llama(make_tokenizer):
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")
    return new_model(len(tokenizer)), tokenizer


@pytest.fixture
def saved(llama, tmp_path):
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def nats(model, read: list[int], scored: int) -> float:
    """Of the last `scored` tokens, as transformers computes it, without padding."""
    ids = torch.tensor([read])
    return F.cross_entropy(model(ids).logits[0, -scored - 1 : -1], ids[0, -scored:], reduction="sum").item()


def naive(model, tokenizer, document: str, start: list[int], *, context: int = 64, stride: int = 32) -> float:
    """Each window begins with `start`, and is followed by as many tokens as there is room for."""
    tokens = [*start, *tokenizer(document, add_special_tokens=False).input_ids]
    first = tokens[: context + 1]
    total, done = nats(model, first, len(first) - max(1, len(start))), len(first)
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        total += nats(model, start + tokens[end - context - 1 + len(start) : end], end - done)
        done = end
    return total


def test_each_document_is_read_alone_after_its_beginning(llama):
    model, tokenizer = llama
    expected = sum(naive(model, tokenizer, document, [0]) for document in DOCUMENTS)
    wrong = sum(naive(model, tokenizer, document, [1]) for document in DOCUMENTS)
    score = score_text(model, tokenizer, DOCUMENTS, context=64)
    assert score.nats == pytest.approx(expected)
    assert score.nats != pytest.approx(wrong, rel=1e-2)
    assert score.tokens == sum(len(tokenizer(each, add_special_tokens=False).input_ids) for each in DOCUMENTS)
    assert score.bytes == sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("stride", [1, 5, CONTEXT - 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_window_of_a_long_document_begins_so(llama, stride, batch_size):
    model, tokenizer = llama
    score = score_text(model, tokenizer, [LONG, *DOCUMENTS], context=CONTEXT, stride=stride, batch_size=batch_size)
    expected = sum(naive(model, tokenizer, each, [0], context=CONTEXT, stride=stride) for each in (LONG, *DOCUMENTS))
    assert score.nats == pytest.approx(expected)


def test_a_stride_leaves_room_for_the_beginning(llama):
    model, tokenizer = llama
    with pytest.raises(UserError, match=r"stride is 16; it must be 1 to the context, 16 less the 1 that begin each"):
        score_text(model, tokenizer, DOCUMENTS, context=CONTEXT, stride=CONTEXT)


def test_of_documents_without_a_beginning_the_first_token_is_only_read(llama):
    model, tokenizer = llama
    marks = document_marks(tokenizer, document_start="none")
    score = score_text(model, tokenizer, DOCUMENTS[:2], context=64, marks=marks)
    assert score.nats == pytest.approx(sum(naive(model, tokenizer, each, []) for each in DOCUMENTS[:2]))
    ids = [tokenizer(each, add_special_tokens=False).input_ids for each in DOCUMENTS[:2]]
    assert score.tokens == sum(len(each) - 1 for each in ids)
    assert score.bytes == sum(len(tokenizer.decode(each[1:])) for each in ids)


def test_the_end_of_text_token_may_be_asked_for_and_parts_documents(llama):
    _, tokenizer = llama
    marks = document_marks(tokenizer, document_start="</s>")
    tokens = encode(tokenizer, DOCUMENTS, marks).tokens
    ids = [tokenizer(each, add_special_tokens=False).input_ids for each in DOCUMENTS]
    assert tokens.tolist() == [1, *ids[0], 1, *ids[1], 1, *ids[2]]


def test_marks_of_two_tokens(make_tokenizer):
    tokenizer = make_tokenizer(template="<pad> <s> $A </s>")
    model = new_model(len(tokenizer))
    score = score_text(model, tokenizer, [LONG, *DOCUMENTS], context=CONTEXT, stride=5)
    expected = sum(naive(model, tokenizer, each, [2, 0], context=CONTEXT, stride=5) for each in (LONG, *DOCUMENTS))
    assert score.nats == pytest.approx(expected)


def test_passages_begin_as_documents_do_and_keep_that_where_they_are_cut(llama):
    model, tokenizer = llama
    passages = [(LONG, "river"), ("quiet copper", "ladder")]
    score = score_last_words(model, tokenizer, passages, context=CONTEXT)
    expected = 0.0
    for context, word in passages:
        before, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (context.strip(), " " + word))
        read = [0, *(before + ids)[-CONTEXT:]] if len(before + ids) > CONTEXT else [0, *before, *ids]
        expected += nats(model, read, len(ids))
    assert score.nats == pytest.approx(expected)
    assert score.truncated == 1


def test_a_passage_with_nothing_before_its_word_is_refused_where_nothing_begins_it(llama):
    model, tokenizer = llama
    marks = document_marks(tokenizer, document_start="none")
    with pytest.raises(UserError, match="nothing stands before the continuation of passage 1"):
        score_last_words(model, tokenizer, [("", "river")], context=CONTEXT, marks=marks)


def test_ends_of_padded_sequences_are_those_of_single_ones(llama):
    model, _ = llama
    batch = [([0, 9, 8, 7, 6], 2), ([0, 5], 1), ([0, 9, 11, 12], 3)]
    found, correct = score_endings(model, batch)
    assert found.tolist() == pytest.approx([nats(model, *each) for each in batch])
    assert correct.tolist() == [score_endings(model, [each])[1].item() for each in batch]


def test_windows_to_learn_from_begin_as_documents_do(llama, tmp_path):
    model, tokenizer = llama
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join([LONG.strip(), *DOCUMENTS]))
    marks = marks_of(model, tokenizer)
    windows = text_windows(tokenizer, [file], 8, marks)
    assert (windows[:, 0] == 0).all()
    stream = encode(tokenizer, [LONG.strip(), *DOCUMENTS], marks).tokens.tolist()
    assert windows[0].tolist() == stream[:8]
    found = [token for token in windows.flatten().tolist() if token]
    assert found == [token for token in stream if token][: len(found)]
    assert len(found) + 8 > len([token for token in stream if token])  # less than a window is left out
    with pytest.raises(UserError, match="context is 1, but 1 tokens begin each window"):
        text_windows(tokenizer, [file], 1, marks)


def test_a_window_that_a_document_begins_has_its_beginning_once():
    tokens = torch.tensor([0, 5, 6, 0, 7, 8, 9])
    assert begin_windows(tokens, 3, (0,)).tolist() == [0, 5, 6, 0, 7, 8, 0, 9]
    assert begin_windows(tokens, 3, ()) is tokens


@pytest.mark.parametrize(
    ("template", "bos", "prompt", "ids"),
    [
        ("<s> $A", "<s>", "tin", [0, ...]),
        (None, "<s>", "tin", [0, ...]),
        ("<s> $A", "<s>", "<s>tin", [0, ...]),  # spelled out: not twice
        ("$A </s>", None, "tin", [...]),  # an end would end the prompt
        (None, "</s>", "tin", [...]),  # GPT-2
        ("</s> $A", "</s>", "tin", [1, ...]),  # OPT
        ("<s> $A", "<s>", "", [0]),
        (None, "</s>", "", [1]),
    ],
)
def test_a_prompt_begins_as_a_document_does(make_tokenizer, template, bos, prompt, ids):
    tokenizer = make_tokenizer(template=template, bos=bos)
    text = tokenizer("tin", add_special_tokens=False).input_ids
    expected = [token for each in ids for token in (text if each is ... else [each])]
    assert prompt_ids(tokenizer, prompt, document_marks(tokenizer)) == expected


def test_what_is_generated_follows_the_beginning(llama):
    model, tokenizer = llama
    ids = torch.tensor([[0, *tokenizer("river", add_special_tokens=False).input_ids]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, top_k=None, attention_mask=torch.ones_like(ids))
    text = sample_text(model, tokenizer, "river", tokens=6, temperature=0)
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert sample_text(model, tokenizer, "river", tokens=6, temperature=0, document_start="none") != text
    with pytest.raises(UserError, match="an empty prompt with --document-start none leaves nothing to continue"):
        sample_text(model, tokenizer, "", tokens=6, document_start="none")


def test_a_row_says_how_documents_were_read(saved, llama, tmp_path):
    model, tokenizer = llama
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    row = evaluate(saved, [file], progress=False)[str(file)]
    assert (row["document_start"], row["start_from"]) == ("<s>", "the tokenizer's template")
    assert row["reading"] == "each document alone"
    expected = sum(naive(model, tokenizer, each, [0]) for each in DOCUMENTS)
    assert row["perplexity"] == pytest.approx(math.exp(expected / row["tokens"]))
    row = evaluate(saved, [file], document_start="none", progress=False)[str(file)]
    assert (row["document_start"], row["start_from"]) == (None, "as asked")
    assert json.loads(json.dumps(row)) == row


def test_a_loaded_model_has_the_beginning_that_its_configuration_names(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    new_model(len(tokenizer), bos_token_id=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert marks_of(*load_model(tmp_path)).start == (2,)


def test_what_a_tokenizer_drops_is_not_counted_in_bits_per_byte(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("spaces")
    new_model(len(tokenizer), bos_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain, mixed = tmp_path / "plain.txt", tmp_path / "mixed.txt"
    plain.write_text("river lantern moss quiet")
    mixed.write_text("ri東ver lan京tern moss quiet")
    with pytest.warns(PeerlmWarning, match=r"no token for 20% of mixed\.txt \(such as '東' '京'\)"):
        rows = evaluate(tmp_path / "model", [plain, mixed], progress=False)
    assert "lost" not in rows[str(plain)]
    assert rows[str(mixed)]["lost"] == {"dropped": 6 / 30}
    for figure in ("bytes", "tokens", "bits_per_byte"):
        assert rows[str(mixed)][figure] == pytest.approx(rows[str(plain)][figure])


def test_a_text_of_which_nothing_is_left_is_refused(make_tokenizer):
    with pytest.raises(UserError, match=r"the tokenizer has no tokens for the words of zh\.txt; give text of its lang"):
        encode(make_tokenizer("spaces"), ["東京"], name="zh.txt")


def test_a_limit_counts_what_was_lost_of_the_part_that_was_read(make_tokenizer):
    tokenizer = make_tokenizer("spaces", unk="<unk>")
    with pytest.warns(PeerlmWarning, match="does not know"):
        found = encode(tokenizer, ["river 東 moss 京"], limit=3)
    assert found.loss.unknown == 3
    assert found.loss.read == found.bytes == len("river 東".encode())


def test_passages_lose_text_too(make_tokenizer):
    tokenizer = make_tokenizer("spaces")
    model = new_model(len(tokenizer))
    with pytest.warns(PeerlmWarning, match=r"no token for 18\.8% of the passages"):
        score = score_last_words(model, tokenizer, [("moss 東 tin", "tin")], context=CONTEXT)
    assert score.loss.dropped == 3


def test_documents_of_any_number_share_passes_and_progress_is_reported(llama):
    model, _ = llama
    documents = [torch.arange(3, 3 + length) for length in (4, 1, 9, 4)]
    marks = document_marks(llama[1])
    done = []
    found = score_documents(
        model, documents, marks, context=8, stride=4, report=lambda scored, total: done.append((scored, total))
    )
    assert done[-1] == (18, 18)
    assert found == pytest.approx([score_documents(model, [each], marks, context=8, stride=4)[0] for each in documents])
