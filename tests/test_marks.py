"""What begins and ends a document, for tokenizers and models of the kinds that there are."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig, LlamaConfig

from peerlm.data.tokenizer import begin_with, train_tokenizer
from peerlm.errors import UserError
from peerlm.marks import document_marks, marked, marks_in, marks_of, template_of


class Model:
    """What is asked of a model: its configurations."""

    def __init__(self, bos_token_id=None, generation_bos=None):
        self.config = LlamaConfig(bos_token_id=bos_token_id)
        self.generation_config = GenerationConfig(bos_token_id=generation_bos)


@pytest.mark.parametrize(
    ("template", "bos", "start", "end", "source"),
    [
        ("<s> $A", "<s>", (0,), (1,), "the tokenizer's template"),  # Llama, Mistral, Gemma
        ("<s> $A", None, (0,), (1,), "the tokenizer's template"),
        ("<s> $A </s>", "<s>", (0,), (1,), "the tokenizer's template"),
        ("<s> $A <pad>", "<s>", (0,), (2,), "the tokenizer's template"),
        ("<pad> <s> $A", "<s>", (2, 0), (1,), "the tokenizer's template"),
        (None, "<s>", (0,), (1,), "the tokenizer's bos_token"),
        ("$A </s>", None, (1,), (1,), "the tokenizer's eos_token"),  # T5
        (None, None, (1,), (1,), "the tokenizer's eos_token"),
        (None, "</s>", (1,), (1,), "the tokenizer's bos_token"),  # GPT-2
        ("</s> $A", "</s>", (1,), (1,), "the tokenizer's template"),  # OPT
    ],
)
def test_marks_follow_the_template_then_bos_then_eos(make_tokenizer, template, bos, start, end, source):
    tokenizer = make_tokenizer(template=template, bos=bos)
    marks = document_marks(tokenizer)
    assert (marks.start, marks.end, marks.source) == (start, end, source)
    assert marks.streamed == (start == end)
    assert marks.window_start == (() if start == end else start)
    # A prompt gets what transformers would give it, and a beginning that is no end of text.
    assert marks.prompt_start == (start if start != end or template == "</s> $A" else ())


CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
"""Of SmolLM2 and Qwen, with the names of the tokens here."""


@pytest.mark.parametrize(
    ("chat", "template", "bos", "model_bos", "start", "end", "source"),
    [
        (CHATML, None, "<s>", 0, "<|endoftext|>", "<|endoftext|>", "the tokenizer's <|endoftext|>"),  # SmolLM2
        (CHATML, None, None, 2, "<pad>", "<|endoftext|>", "the model's bos_token_id"),  # Qwen
        (CHATML, "<pad> $A", "<pad>", None, "<pad>", "<|endoftext|>", "the tokenizer's template"),  # Llama 3
        ("<s>{{ messages[0]['content'] }}</s>", None, "<s>", None, "<s>", "</s>", "the tokenizer's bos_token"),
        ("{{ raise_exception('no') }}", None, "<s>", None, "<s>", "</s>", "the tokenizer's bos_token"),
    ],
)
def test_a_token_of_turns_begins_and_ends_no_document(
    make_tokenizer, chat, template, bos, model_bos, start, end, source
):
    tokenizer = make_tokenizer(template=template, bos=bos, unk="<|endoftext|>")
    tokenizer.chat_template = chat
    marks = document_marks(tokenizer, model_bos)
    names = (marked(marks.start, tokenizer), marked(marks.end, tokenizer), marks.source)
    assert names == (start, end, source)
    assert marks.prompt_start == (() if start == end else marks.start)


def test_an_end_of_turns_ends_documents_where_nothing_else_does(make_tokenizer):
    tokenizer = make_tokenizer(bos="<s>")
    tokenizer.chat_template = CHATML
    assert document_marks(tokenizer).start == document_marks(tokenizer).end == (1,)


def test_our_own_tokenizers_part_documents_by_one_token():
    marks = document_marks(train_tokenizer(["a b"], 300))
    assert (marks.start, marks.end, marks.window_start, marks.prompt_start) == ((0,), (0,), (), ())
    assert marks.reading == "documents in sequence"


def test_the_models_bos_counts_where_the_tokenizer_names_none_and_knows_it(make_tokenizer):
    tokenizer = make_tokenizer()
    for model in (Model(2), Model(None, 2)):
        marks = marks_of(model, tokenizer)
        assert (marks.start, marks.source) == ((2,), "the model's bos_token_id")
    assert marks_of(Model(40), tokenizer).start == (1,)  # a token of text: a configuration's default
    assert marks_of(Model(10**6), tokenizer).start == (1,)
    assert marks_of(Model(2), make_tokenizer(bos="<s>")).start == (0,)
    assert marks_of(object(), tokenizer).start == (1,)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("config.json", {"bos_token_id": 2}),
        ("config.json", {"text_config": {"bos_token_id": 2}, "bos_token_id": 0}),
        ("generation_config.json", {"bos_token_id": 2}),
    ],
)
def test_a_saved_models_folder_says_the_same(make_tokenizer, tmp_path, file, config):
    (tmp_path / file).write_text(json.dumps(config))
    assert marks_in(tmp_path, make_tokenizer()).start == (2,)


def test_a_folder_without_a_model_leaves_it_to_the_tokenizer(make_tokenizer, tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    for place in (tmp_path, tmp_path / "config.json", Path("nowhere")):
        assert marks_in(place, make_tokenizer()).start == (1,)


def test_the_user_may_say_otherwise(make_tokenizer):
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")
    none = document_marks(tokenizer, document_start="none")
    assert (none.start, none.end, none.prompt_start, none.streamed) == ((), (1,), (), False)
    asked = document_marks(tokenizer, document_start="<pad>")
    assert (asked.start, asked.prompt_start, asked.source) == ((2,), (2,), "as asked")
    assert document_marks(tokenizer, document_start="</s>").streamed
    with pytest.raises(UserError, match=r"--document-start is '<bos>', which is no token .* such as <s>, </s>, <pad>"):
        document_marks(tokenizer, document_start="<bos>")


def test_chat_templates_are_not_applied(make_tokenizer):
    tokenizer = make_tokenizer(bos="<s>")
    tokenizer.chat_template = "<pad>{{ messages[0].content }}"
    assert document_marks(tokenizer).start == (0,)


def test_a_template_is_found_whatever_the_vocabulary(make_tokenizer):
    tokenizer = make_tokenizer("spaces", template="<s> $A </s>")
    assert tokenizer("0", add_special_tokens=False).input_ids[1:] == []
    assert template_of(tokenizer) == ((0,), (1,))
    begin_with(tokenizer, (2, 0))
    assert template_of(tokenizer) == ((2, 0), ())
    begin_with(tokenizer, ())
    assert template_of(tokenizer) == ((), ())


def test_marks_are_shown_as_their_tokens(make_tokenizer):
    assert marked((2, 0), make_tokenizer()) == "<pad><s>"
    assert marked((), make_tokenizer()) is None
