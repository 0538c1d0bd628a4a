"""An engine writes what `generate` writes, whatever else is in its batch, and outlives every request."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peerlm.errors import UserError
from peerlm.serve import Engine, QueueFull, Request, SamplingParams, cache

from ..models import build
from .conftest import MODELS, Gate, Letters, alone, greedy, make, tokens_of

New = Callable[..., Engine]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_generate_whatever_else_is_in_the_batch(name: str, engine: New) -> None:
    model = make(name)
    choice = random.Random(name)
    cases = [
        (tuple(choice.randrange(3, 64) for _ in range(choice.choice([1, 2, 5, 13]))), choice.choice([1, 4, 11]))
        for _ in range(9)
    ]
    expected = [alone(model, prompt, tokens) for prompt, tokens in cases]
    served = engine(model, slots=3, chunk=6)
    handles = []
    for prompt, tokens in cases:
        handles.append(served.submit(greedy(prompt, tokens)))
        noise = served.submit(greedy(prompt[:3], 15))
        if choice.random() < 0.5:  # some leave while they run, others while they wait
            next(noise)
        noise.cancel()
    for handle, wanted in zip(handles, expected, strict=True):
        events = list(handle)
        assert tokens_of(events) == wanted
        assert events[-1].finish_reason == "length"
    assert served.drain(10)
    assert not served._cache.lengths


def test_prefixes_of_earlier_requests_are_not_read_again_and_change_no_token(engine: New) -> None:
    model = make("peer with shifts and sinks")
    prompt = tuple(3 + place * 7 % 50 for place in range(20))
    expected = alone(model, (*prompt, 5), 6)
    served = engine(model)
    first = list(served.submit(greedy((*prompt, 9), 4)))
    again = list(served.submit(greedy((*prompt, 5), 6)))
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 20)
    assert tokens_of(again) == expected
    conversation = (*prompt, 9, *tokens_of(first)[:3], 4, 4)
    wanted = alone(model, conversation, 3)
    events = list(served.submit(greedy(conversation, 3)))
    assert events[0].cached_tokens == len(conversation) - 2
    assert tokens_of(events) == wanted
    assert served.stats().cached_tokens == 20 + len(conversation) - 2


def test_one_prompt_submitted_several_times_is_read_once(engine: New) -> None:
    model = make("llama")
    prompt = tuple(range(3, 23))
    expected = alone(model, prompt, 4)
    served = engine(model)
    gate = Gate(model)
    first = served.submit(greedy((3,), 1))
    assert gate.reached.wait(10)
    handles = [served.submit(greedy(prompt, 4)) for _ in range(4)]
    gate.open()
    found = [list(handle) for handle in (first, *handles)][1:]
    assert [tokens_of(events) for events in found] == [expected] * 4
    assert [events[0].cached_tokens for events in found] == [0, 19, 19, 19]


def test_the_cache_stays_within_its_limit_and_is_reused(engine: New) -> None:
    model = make("llama")
    served = engine(model, slots=2, prefix_bytes=1000)
    for length in (1, 25, 3, 12):
        for handle in [served.submit(greedy(range(3, 3 + length), 32 - length)) for _ in range(3)]:
            assert len(tokens_of(handle)) == 32 - length
    stats = served.stats()
    assert 0 < stats.cache_bytes <= stats.cache_bytes_limit
    assert "2 slots of 32 tokens, 192 bytes each" in served.description


@pytest.mark.parametrize("name", ["peer with shifts", "peer with shifts and sinks"])
def test_columns_move_back_when_their_end_is_reached(name: str, engine: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerlm.serve.cache.FIRST_COLUMNS", 8)
    monkeypatch.setattr("peerlm.serve.cache.MIN_SPARE", 2)
    model = make(name)
    expected = {length: alone(model, range(3, 3 + length), 9) for length in (1, 4, 15)}
    served = engine(model, slots=5)
    handles = [(length, served.submit(greedy(range(3, 3 + length), 9))) for length in (1, 4, 15, 4, 1, 15, 1) * 2]
    for length, handle in handles:
        assert tokens_of(handle) == expected[length]


def test_the_same_seed_writes_the_same_text_in_any_batch(engine: New) -> None:
    served = engine(make("peer"))

    def request(seed: int) -> Request:
        return Request(prompt=(5, 9), sampling=SamplingParams(max_tokens=12, temperature=2.0, seed=seed, top_p=0.95))

    first = tokens_of(served.submit(request(7)))
    handles = [served.submit(request(seed)) for seed in (1, 7, 3)]
    found = [tokens_of(handle) for handle in handles]
    assert found[1] == first
    assert len({*map(tuple, found)}) == 3


def test_log_probabilities_are_those_of_the_model(engine: New) -> None:
    model = make("llama")
    prompt = tuple(range(3, 12))
    served = engine(model, chunk=4)
    events = list(served.submit(greedy(prompt, 3, logprobs=2, prompt_logprobs=1)))
    tokens = [*prompt, *tokens_of(events)]
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    known = events[0].prompt_logprobs
    assert known is not None
    assert known[0] is None
    reported = [*known[1:], *(event.logprobs for event in events)]
    for place, one in enumerate(reported):
        assert one is not None
        assert one.token_id == tokens[place + 1]
        assert one.logprob == pytest.approx(logprobs[place, tokens[place + 1]].item(), abs=1e-4)
        best = logprobs[place].topk(len(one.top))
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert len(one.top) == (1 if place < len(prompt) - 1 else 2)
    assert events[1].prompt_logprobs is None


def test_a_prompt_is_read_without_writing_where_no_token_is_wanted(engine: New) -> None:
    (event,) = engine(make("llama")).submit(greedy((4, 5, 6), 0, prompt_logprobs=0))
    assert (event.token_id, event.finish_reason) == (None, "length")
    assert event.prompt_logprobs is not None
    assert len(event.prompt_logprobs) == 3


def test_what_cannot_be_served_is_refused_and_disturbs_nobody(engine: New) -> None:
    served = engine(make("llama"), slots=1, queue=1)
    running = served.submit(greedy((3,), 31))
    with pytest.raises(UserError, match="the prompt has 32 tokens, but prompt and text together may have 32; shorten"):
        served.submit(greedy(range(3, 35), 1))
    with pytest.raises(UserError, match="prompt has the token id 64; the model knows 0 to 63"):
        served.submit(greedy((64,), 1))
    with pytest.raises(UserError, match="logit_bias has the token id -1"):
        served.submit(greedy((3,), 1, logit_bias={-1: 1.0}))
    with pytest.raises(UserError, match="stop_token_ids has the token id 64; the model knows 0 to 63"):
        served.submit(greedy((3,), 1, stop_token_ids=(64,)))
    with pytest.raises(UserError, match="no pack or adapter 'law' is loaded; there is none"):
        served.submit(greedy((3,), 1, packs=("law",)))
    assert len(tokens_of(running)) == 31
    assert tokens_of(served.submit(greedy((3,), 5))) == alone(served._forward.model, (3,), 5)


def test_a_full_queue_refuses_and_waiting_requests_can_be_cancelled(engine: New) -> None:
    model = make("llama")
    served = engine(model, slots=1, queue=1)
    gate = Gate(model)
    running = served.submit(greedy((3,), 4))
    assert gate.reached.wait(10)
    waiting = served.submit(greedy((4,), 4))
    with pytest.raises(QueueFull, match="1 requests wait already, which is the most; try again later"):
        served.submit(greedy((5,), 4))
    assert served.stats().waiting == 1
    waiting.cancel()
    running.cancel()
    gate.open()
    assert [event.finish_reason for event in waiting] == ["cancelled"]
    assert list(running)[-1].finish_reason == "cancelled"
    assert len(tokens_of(served.submit(greedy((5,), 4)))) == 4


def test_requests_end_at_their_deadline_wherever_they_are(engine: New) -> None:
    model = make("llama")
    served = engine(model, slots=1)
    gate = Gate(model)
    soon = time.monotonic() + 0.05
    handles = [served.submit(greedy((3,), 31, deadline=soon)) for _ in range(2)]
    assert gate.reached.wait(10)
    time.sleep(0.06)
    gate.open()
    assert [list(handle)[-1].finish_reason for handle in handles] == ["timeout", "timeout"]


class Spoil:
    """Makes logits of rows with a certain token not finite, or fails at them."""

    def __init__(self, model: Any, token: int, *, fails: bool):
        self._token, self._fails = token, fails
        model.register_forward_hook(self._spoil, with_kwargs=True)

    def _spoil(self, module: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        bad: Tensor = (options["input_ids"] == self._token).any(dim=1)
        if self._fails and bad.any():
            raise RuntimeError("a kernel\nfailed")
        output.logits[bad] = torch.nan
        for layer in options["past_key_values"].layers:
            layer.keys[: len(bad)][bad] = torch.nan


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("place", ["prompt", "text"])
def test_a_request_at_which_the_model_fails_ends_alone(fails: bool, place: str, engine: New) -> None:
    model = make("llama")
    prompts = [(3, 4), (5, 6, 7), (8,), (9, 10)]
    expected = [alone(model, prompt, 12) for prompt in prompts]
    served = engine(model, slots=4)
    Spoil(model, 63, fails=fails)
    bad = (3, 63) if place == "prompt" else (11, 12, 13, 14, 15)
    bias = {} if place == "prompt" else {63: 100.0}
    for _ in range(2):
        handles = [served.submit(greedy(prompt, 12)) for prompt in prompts[:2]]
        handles.insert(1, served.submit(greedy(bad, 12, logit_bias=bias)))
        handles += [served.submit(greedy(prompt, 12)) for prompt in prompts[2:]]
        first, spoiled, *others = [list(handle) for handle in handles]
        assert [tokens_of(events) for events in (first, *others)] == expected
        assert spoiled[-1].finish_reason == "error"
        assert spoiled[-1].error is not None
        wanted = "the model failed with RuntimeError: a kernel failed" if fails else "logits are not finite"
        assert wanted in spoiled[-1].error
    assert served.stats().finished == {"length": 8, "error": 2}


class Short:
    """Memory that is short once: a function that makes tensors fails in its call of a certain number."""

    def __init__(self, make: Callable[..., Any], call: int):
        self._make, self._left = make, call

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError("no memory")
        return self._make(*arguments, **options)


@pytest.mark.parametrize("place", ["peerlm.serve.cache._empty", "torch.empty_like"])
def test_a_request_for_which_memory_is_short_ends_alone(
    place: str, engine: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    prompts = [(3,), (4,), (5,), (6,), tuple(range(3, 23)), tuple(range(13, 31))]
    expected = [alone(model, prompt, 10) for prompt in prompts]
    served = engine(model, slots=8, prefix_bytes=0)
    running = [served.submit(greedy(prompt, 10)) for prompt in prompts[:4]]
    first = [next(handle) for handle in running]
    gate = Gate(model)
    assert gate.reached.wait(10)
    short = Short(cache._empty if "cache" in place else torch.empty_like, 3 if "cache" in place else 1)
    monkeypatch.setattr(place, short)
    late = [served.submit(greedy(prompt, 10)) for prompt in prompts[4:]]
    gate.open()
    found = [[event, *handle] for event, handle in zip(first, running, strict=True)]
    refused, other = (list(handle) for handle in late)
    assert [tokens_of(events) for events in (*found, other)] == [*expected[:4], expected[5]]
    assert tokens_of(refused) == expected[4][:1]
    assert refused[-1].error == "the model failed with OutOfMemoryError: no memory"
    assert tokens_of(served.submit(greedy(prompts[4], 10))) == expected[4]


def test_an_engine_outlives_faults_of_its_own(engine: New, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    served = engine(make("llama"))

    def broken(*arguments: Any) -> None:
        raise RuntimeError("a fault of the engine")

    monkeypatch.setattr(served._cache, "prepare", broken)
    events = list(served.submit(greedy((3,), 4)))
    monkeypatch.undo()
    assert events[-1].error == "the model failed with RuntimeError: a fault of the engine"
    assert "a fault of the engine" in capsys.readouterr().err
    assert len(tokens_of(served.submit(greedy((3,), 4)))) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2", "keeps DynamicSlidingWindowLayer in its cache; the engine serves models whose attention sees all"),
        ("expert_choice", "model.layers.0.ffw chooses among the tokens of a whole batch"),
    ],
)
def test_models_whose_rows_cannot_join_and_leave_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(build(name), None)


def test_a_model_that_ignores_padding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    plain = model.forward

    def without_mask(input_ids: Tensor, past_key_values: Any, use_cache: bool, **options: Any) -> Any:
        return plain(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", without_mask)
    with pytest.raises(UserError, match=r"differ by .*% between a batch and a sequence alone"):
        Engine(model, None)


@pytest.mark.parametrize(("name", "value"), [("slots", 0), ("context", 1), ("queue", 0), ("chunk", 0), ("context", 33)])
def test_settings_out_of_range_are_named(name: str, value: int) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"^{name} is {value}; "):
        Engine(make("llama"), None, **settings)


def test_end_of_text_tokens_and_stop_tokens_end_a_text(engine: New) -> None:
    model = make("llama")
    expected = alone(model, (5, 9), 12)
    end = expected[3]
    place = expected.index(end) + 1
    model.generation_config.eos_token_id = [end]
    served = engine(model)
    events = list(served.submit(greedy((5, 9), 12)))
    assert tokens_of(events) == expected[:place]
    assert (events[-1].finish_reason, events[-1].stop, events[-1].text) == ("stop", end, "")
    assert tokens_of(served.submit(greedy((5, 9), 12, ignore_eos=True))) == expected
    stopped = list(served.submit(greedy((5, 9), 12, ignore_eos=True, stop_token_ids=(expected[0],))))
    assert [event.stop for event in stopped] == [expected[0]]
    longer = tokens_of(served.submit(greedy((5, 9), 12, min_tokens=10)))
    assert len(longer) >= 10
    assert end not in longer[:9]


def test_stop_strings_end_a_text_once_enough_is_written(engine: New) -> None:
    model = make("llama")
    text = Letters().decode(alone(model, (5, 9), 12))
    stop = text[4:6]
    place = text.index(stop)
    served = engine(model)
    events = list(served.submit(greedy((5, 9), 12, stop=(stop,))))
    assert "".join(event.text for event in events) == text[:place]
    assert (len(tokens_of(events)), events[-1].finish_reason, events[-1].stop) == (place + 2, "stop", stop)
    events = list(served.submit(greedy((5, 9), 12, stop=tuple(set(text)), min_tokens=8)))
    assert "".join(event.text for event in events) == text[:7]
    assert (len(tokens_of(events)), events[-1].stop) == (8, text[7])


def test_the_text_of_a_special_token_ends_a_text_at_that_token(engine: New) -> None:
    served = engine(make("llama"))
    bias = {63: 100.0}
    events = list(served.submit(greedy((5, 9), 12, stop=("<end>",), logit_bias=bias)))
    assert (tokens_of(events), events[-1].finish_reason, events[-1].stop) == ([63], "stop", 63)
    later = tokens_of(served.submit(greedy((5, 9), 12, stop=("<end>",), logit_bias=bias, min_tokens=3)))
    assert later.index(63) == len(later) - 1 == 3
    assert len(tokens_of(served.submit(greedy((5, 9), 12, stop=("<end",), logit_bias=bias)))) == 12


def test_traces_are_those_of_the_token_before(engine: New) -> None:
    model = make("peer")
    events = list(engine(model).submit(greedy((5, 9, 7), 4, trace=True)))
    index = model.get_submodule("model.layers.1.ffw.product_keys")
    seen: list[Tensor] = []
    with index.register_forward_hook(lambda *call: seen.extend(call[2])), torch.no_grad():
        model(torch.tensor([[5, 9, 7, *tokens_of(events)]]))
    weights, ids = (each[0] for each in seen)
    for place, event in enumerate(events, start=2):
        assert event.experts is not None
        used = dict(event.experts["model.layers.1.ffw.product_keys"])
        assert set(used) == set(ids[place].flatten().tolist())
        best = int(ids[place].flatten()[0])
        total = weights[place].flatten()[ids[place].flatten() == best].sum().item()
        assert used[best] == pytest.approx(total, abs=1e-5)


def test_traced_requests_say_which_experts_were_used(engine: New) -> None:
    served = engine(make("peer"))
    handles = [served.submit(greedy((5, 9), 3, trace=trace)) for trace in (True, False)]
    traced, plain = (list(handle) for handle in handles)
    assert all(event.experts is None for event in plain)
    for event in traced:
        assert event.experts is not None
        assert sorted(event.experts) == [f"model.layers.{layer}.ffw.product_keys" for layer in range(3)]
        for used in event.experts.values():
            weights = [abs(weight) for _, weight in used]
            assert weights == sorted(weights, reverse=True)
            assert sum(weight for _, weight in used) == pytest.approx(2)  # softmax over each of two heads
            assert all(0 <= expert < 64 for expert, _ in used)
    use = served.stats().use
    assert {one.experts for one in use.values()} == {64}
    assert all(0 < one.share < 1 for one in use.values())


def test_a_drained_engine_takes_nothing_and_a_closed_one_ends_all(engine: New) -> None:
    model = make("llama")
    served = engine(model)
    handle = served.submit(greedy((3,), 20))
    assert served.drain(10)
    assert len(tokens_of(handle)) == 20
    with pytest.raises(QueueFull, match="as it stops"):
        served.submit(greedy((3,), 20))
    other = engine(model)
    gate = Gate(model)
    running = other.submit(greedy((3,), 20))
    assert gate.reached.wait(10)
    assert not other.drain(0.001)
    closing = threading.Thread(target=other.close)
    closing.start()
    while not other._closing:
        time.sleep(0.001)
    gate.open()
    closing.join()
    other.close()
    assert list(running)[-1].finish_reason == "cancelled"


def test_measures_count_what_happened(engine: New) -> None:
    served = engine(make("llama"), slots=2)
    handles = [served.submit(greedy(range(3, 3 + length), 5)) for length in (4, 7)]
    assert [len(tokens_of(handle)) for handle in handles] == [5, 5]
    assert served.drain(10)
    stats = served.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished) == (11, 10, {"length": 2})
    assert sum(stats.first_token_seconds.counts) == 2
    assert sum(stats.token_seconds.counts) == 8
    assert stats.tokens_per_second == pytest.approx(1.0)
    assert (stats.waiting, stats.running, stats.slots) == (0, 0, 2)
