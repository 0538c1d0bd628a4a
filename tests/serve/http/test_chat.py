"""/v1/chat/completions, through OpenAI's own client and by hand."""

import openai
import pytest
from openai.types.chat import ChatCompletion

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the lamp?"}]


def test_a_chat_is_written_by_the_template(toy):
    answer = toy.openai.chat.completions.create(model="toy", messages=MESSAGES, max_completion_tokens=4)
    ids = toy.engine.requests[-1].prompt
    assert toy.engine.tokenizer.decode(ids) == "system: be brief\nuser: the lamp?\nassistant: "
    assert answer.choices[0].message.content == toy.engine.tokenizer.decode(ids[:4])
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_may_fill_the_context(toy):
    answer = toy.openai.chat.completions.create(model="toy", messages=MESSAGES)
    assert answer.usage.total_tokens == toy.engine.context


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_says_what_a_whole_answer_says(toy, n, extra):
    asked = {"model": "toy", "messages": MESSAGES, "max_tokens": 6, "n": n, **extra}
    whole = toy.openai.chat.completions.create(**asked)
    chunks = list(toy.openai.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[0].delta.role == "assistant"
        assert parts[-1].finish_reason == choice.finish_reason
        if extra:
            entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
            assert entries == choice.logprobs.content
            assert len(entries) == 6
            assert len(entries[0].top_logprobs) == 2
            assert all(bytes(entry.bytes).decode(errors="replace") for entry in entries)
    raw = toy.post("/v1/chat/completions", messages=MESSAGES, max_tokens=2).json()
    ChatCompletion.model_validate(raw, strict=True)


def test_messages_in_parts_are_joined(toy):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "lamp"}]
    toy.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert "user: the lamp\n" in toy.engine.tokenizer.decode(toy.engine.requests[-1].prompt)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": "hello"}, "messages: "),
        ({"tools": [{"type": "function"}]}, "does not support it: leave it out"),
        ({"response_format": {"type": "json_object"}}, "does not support it"),
        ({"modalities": ["audio"]}, "does not support it"),
        ({"web_search_options": {}}, "does not support it"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs is 21"),
        ({"logprobs": 2}, "logprobs: "),
        ({"echo": True}, "unknown field 'echo'"),
        ({"add_special_tokens": True}, "add_special_tokens: this server does not support it"),
        ({"max_completion_tokens": 2}, "it is 2, but max_tokens is 1: they mean the same, so give one of them"),
        ({"stream_options": {"include_usage": True}}, "stream_options: it needs stream = true"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(toy, fields, says):
    answer = toy.post("/v1/chat/completions", **{"messages": MESSAGES, "max_tokens": 1, **fields})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_fields_of_openai_that_change_nothing_are_taken(toy):
    fields = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "user": "u",
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "modalities": ["text"],
    }
    assert toy.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, **fields).status_code == 200


def test_the_template_gets_the_names_of_who_speaks(toy, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.name or m.role }}, {% endfor %}")
    messages = [{"role": "user", "name": "lamp", "content": "x"}, {"role": "user", "content": "y"}]
    toy.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert toy.engine.tokenizer.decode(toy.engine.requests[-1].prompt) == "lamp, user, "


def test_a_chat_that_is_too_long_is_a_fault_of_its_messages(toy):
    messages = [{"role": "user", "content": "lamp " * 64}]
    answer = toy.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_one_number_of_tokens_may_have_both_names(toy):
    answer = toy.post("/v1/chat/completions", messages=MESSAGES, max_tokens=2, max_completion_tokens=2)
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_what_tokenizing_would_ignore_is_refused(toy):
    for fields, param in (
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "lamp", "add_generation_prompt": True}, "add_generation_prompt"),
    ):
        answer = toy.http.post("/tokenize", json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert toy.http.post("/tokenize", json={"messages": MESSAGES, "add_special_tokens": False}).status_code == 200


def test_without_a_template_the_answer_says_what_to_use(start, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions") as caught:
        start().openai.chat.completions.create(model="toy", messages=MESSAGES)
    assert caught.value.code == "no_chat_template"


def test_a_template_that_refuses_is_400(start, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system, please') }}")
    with pytest.raises(openai.BadRequestError, match="no system, please"):
        start().openai.chat.completions.create(model="toy", messages=MESSAGES)
