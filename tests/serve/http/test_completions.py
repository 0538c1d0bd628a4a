"""/v1/completions, through OpenAI's own client and by hand."""

import openai
import pytest
from openai.types import Completion

from .toy import LOGPROB


def written(toy, prompt_ids, count):
    return toy.engine.tokenizer.decode([prompt_ids[i % len(prompt_ids)] for i in range(count)])


def test_a_text_is_continued(toy):
    answer = toy.openai.completions.create(model="toy", prompt="The old keeper", max_tokens=5)
    ids = toy.engine.requests[-1].prompt
    assert answer.choices[0].text == written(toy, ids, 5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.total_tokens == 5 + len(ids)
    assert answer.object == "text_completion"
    assert answer.model == "toy"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}])
def test_a_stream_says_what_a_whole_answer_says(toy, n, extra):
    asked = {"model": "toy", "prompt": "climbed the stairs", "max_tokens": 6, "n": n, "temperature": 0, **extra}
    whole = toy.post("/v1/completions", **asked).json()
    chunks = list(toy.openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice["index"]]
        assert "".join(part.text for part in parts) == choice["text"]
        assert [part.finish_reason for part in parts][-1] == choice["finish_reason"] == "length"
        if "logprobs" in extra:
            for name, values in choice["logprobs"].items():
                assert [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)] == values
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump() == {**chunks[-1].usage.model_dump(), **whole["usage"]}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    Completion.model_validate({**whole, "choices": [{**c, "logprobs": None} for c in whole["choices"]]}, strict=True)


def test_a_stream_ends_with_done_and_counts_in_every_chunk_if_asked(toy):
    options = {"continuous_usage_stats": True}
    answer = toy.post("/v1/completions", prompt="lamp", max_tokens=2, stream=True, stream_options=options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all('"completion_tokens":' in line for line in lines[:-1])


def test_prompts_of_every_kind_are_read(toy):
    ids = toy.http.post("/tokenize", json={"prompt": "the lamp", "add_special_tokens": False}).json()["tokens"]
    for prompt, expected in (("the lamp", [ids]), (ids, [ids]), ([ids, ids[:1]], [ids, ids[:1]])):
        before = len(toy.engine.requests)
        choices = toy.openai.completions.create(model="toy", prompt=prompt, max_tokens=3).choices
        assert [list(request.prompt) for request in toy.engine.requests[before:]] == expected
        assert [choice.text for choice in choices] == [written(toy, given, 3) for given in expected]
    before = len(toy.engine.requests)
    choices = toy.openai.completions.create(model="toy", prompt=["the", "lamp"], max_tokens=3, n=2).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    prompts = [request.prompt for request in toy.engine.requests[before:]]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


def test_echo_and_log_probabilities_are_those_that_lm_eval_reads(toy):
    ids = toy.http.post("/tokenize", json={"prompt": "the lamp", "add_special_tokens": False}).json()["tokens"]
    asked = {"prompt": [ids, ids[:1]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    choices = toy.post("/v1/completions", **asked).json()["choices"]
    for choice, given in zip(choices, [ids, ids[:1]], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(given) + 1
        assert logprobs["token_logprobs"] == [None, *[LOGPROB] * len(given)]
        assert logprobs["top_logprobs"][0] is None
        assert all(max(top.values()) == LOGPROB for top in logprobs["top_logprobs"][1:])
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert [choice["text"][place] for place in logprobs["text_offset"]] == [t[0] for t in logprobs["tokens"]]


def test_the_places_of_tokens_are_those_of_the_text(toy):
    prompt = "a café 灯"
    asked = {"prompt": prompt, "max_tokens": 2, "logprobs": 0, "echo": True, "temperature": 0}
    choice = toy.post("/v1/completions", **asked).json()["choices"][0]
    places = choice["logprobs"]["text_offset"]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-2] == len(prompt)
    begun = [text for text in choice["logprobs"]["tokens"] if not text.startswith("bytes:")]
    assert all(choice["text"].find(text) in places for text in begun if text in choice["text"])


def test_a_prompt_alone_is_scored_without_a_new_token(toy):
    answer = toy.post("/v1/completions", prompt="the lamp", max_tokens=0, echo=True, logprobs=0).json()
    assert answer["choices"][0]["text"] == "the lamp"
    assert answer["usage"]["completion_tokens"] == 0


def test_fields_reach_the_engine(toy):
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 7,
        "stop": ["zz", "yy"],
        "stop_token_ids": [1],
        "ignore_eos": True,
        "logit_bias": {"5": 1.5},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 1,
        "max_tokens": 2,
        "logprobs": 4,
    }
    assert toy.post("/v1/completions", prompt="lamp", **fields).status_code == 200
    sampling = toy.engine.requests[-1].sampling
    expected = {**fields, "stop": ("zz", "yy"), "stop_token_ids": (1,), "logit_bias": {5: 1.5}}
    assert {name: getattr(sampling, name) for name in fields} == expected


def test_choices_of_one_prompt_have_seeds_of_their_own(toy):
    before = len(toy.engine.requests)
    toy.post("/v1/completions", prompt="lamp", n=3, seed=2**63 - 2, max_tokens=1)
    assert [r.sampling.seed for r in toy.engine.requests[before:]] == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_a_stop_text_is_left_out(toy):
    ids = toy.http.post("/tokenize", json={"prompt": "the lamp", "add_special_tokens": False}).json()["tokens"]
    second = toy.engine.tokenizer.decode(ids[1:2])
    answer = toy.post("/v1/completions", prompt=ids, stop=second, max_tokens=9).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == toy.engine.tokenizer.decode(ids[:1])


def test_experts_are_told_on_request_alone(toy):
    assert "experts" not in toy.post("/v1/completions", prompt="lamp", max_tokens=1).json()["choices"][0]
    choice = toy.post("/v1/completions", prompt="lamp", max_tokens=2, experts=True).json()["choices"][0]
    assert len(choice["experts"]) == 2
    assert choice["experts"][0][0]["layer"] == "model.layers.1.ffw"
    assert choice["experts"][0][0]["weights"] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"best_of": 3}, "only best_of = n"),
        ({"suffix": "end"}, "does not support it"),
        ({"prompt": []}, "an empty list"),
        ({"prompt": [[]]}, "a prompt has no token"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [10**6]}, "no token 1000000"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5] * 64}, "the context has 64"),
        ({"prompt": ["a"] * 129}, "129 prompts"),
        ({"n": 100, "prompt": ["a", "b"]}, "more than the 128 texts"),
        ({"n": 0}, "n: "),
        ({"n": True}, "n: "),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 10**30}, "max_tokens: "),
        ({"max_tokens": "5"}, "max_tokens: "),
        ({"max_tokens": 1.5}, "max_tokens: "),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature: "),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": 2**70}, "seed: "),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": True}, "logprobs: "),
        ({"stop": ""}, "stop: give at most"),
        ({"stop": ["a"] * 17}, "stop: give at most"),
        ({"logit_bias": {"x": 1}}, "'x' is no token id"),
        ({"logit_bias": {"-1": 1}}, "'-1' is no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias has 1"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "1,025 tokens"),
        ({"store": True}, "does not support it"),
        ({"stream_options": {"other": 1}}, "stream_options: unknown field 'other'"),
        ({"made_up": 1}, "unknown field 'made_up'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(toy, fields, says):
    answer = toy.post("/v1/completions", **{"prompt": "lamp", "max_tokens": 1, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": [5] * 64}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ],
    ids=str,
)
def test_the_field_that_is_wrong_is_named(toy, fields, param):
    answer = toy.post("/v1/completions", **{"prompt": "lamp", "max_tokens": 1, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_of_a_prompt_count_once(toy, stream):
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    asked = {"model": "toy", "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 2, "n": 3, **options}
    answer = toy.openai.completions.create(**asked)
    usage = list(answer)[-1].usage if stream else answer.usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (5, 3)


def test_an_unknown_model_is_404(toy):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        toy.openai.completions.create(model="gpt-4", prompt="x")


def test_a_full_queue_is_429_and_leaves_nothing_behind(start):
    small = start(engine_queue=2, engine_pace=0.01)
    with pytest.raises(openai.RateLimitError, match="come again later") as caught:
        small.openai.completions.create(model="toy", prompt="lamp", n=3, max_tokens=50)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "queue_full"
    assert small.engine.drain(5)
    assert small.engine.finished == {"cancelled": 2}


def test_a_request_that_takes_too_long_is_504(start):
    slow = start(deadline_seconds=0.05, engine_pace=0.02)
    answer = slow.post("/v1/completions", prompt="lamp", max_tokens=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    assert answer.headers["x-should-retry"] == "false"
    streamed = slow.openai.completions.create(model="toy", prompt="lamp", max_tokens=60, stream=True)
    with pytest.raises(openai.APIError, match="took longer"):
        list(streamed)


def test_more_tokens_than_allowed_are_refused(start):
    short = start(max_new_tokens=4)
    assert "at most 4" in short.post("/v1/completions", prompt="a", max_tokens=5).json()["error"]["message"]
    assert short.post("/v1/completions", prompt="a", max_tokens=4).status_code == 200
    assert short.post("/v1/completions", prompt="a").json()["usage"]["completion_tokens"] == 4


def test_a_failure_of_the_engine_is_500_in_words(start):
    broken = start()
    broken.engine.fail = "the numbers are not finite"
    answer = broken.post("/v1/completions", prompt="a", n=2)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the numbers are not finite")
