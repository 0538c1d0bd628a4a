"""Sampling is by its arguments: no default of transformers and no saved configuration changes the distribution."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from peerlm.errors import UserError
from peerlm.evaluate import notes_on_generation, sample_text
from peerlm.evaluate.sample import plain_generation


@pytest.fixture(scope="module")
def flat(make_tokenizer):
    """A model that finds all of its 300 or so tokens about as likely, and its tokenizer."""
    tokenizer = make_tokenizer(bos="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, eos_token_id=1, pad_token_id=2)).eval()
    return model, tokenizer


def ranks(model, tokenizer, **options) -> torch.Tensor:
    """Ranks of 60 tokens, each drawn after the same prompt."""
    ids = tokenizer("tin").input_ids
    with torch.no_grad():
        order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).argsort()
    drawn = []
    for seed in range(60):
        torch.manual_seed(seed)
        text_ids = _ids(model, tokenizer, seed=seed, **options)
        assert text_ids[: len(ids)] == ids
        drawn.append(order[text_ids[len(ids)]])
    return torch.stack(drawn)


def _ids(model, tokenizer, **options) -> list[int]:
    """Token ids of a sample of one token; a streamer sees them as they are."""
    seen: list[int] = []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            pass

    sample_text(model, tokenizer, "tin", tokens=1, streamer=Streamer(), **options)
    return seen


def test_all_tokens_may_be_drawn(flat):
    found = ranks(*flat, temperature=1.0)
    share = (found >= 50).float().mean().item()
    assert 0.6 < share < 1  # about 5 of 6 tokens are not among the 50 likeliest


def test_top_k_and_top_p_draw_from_the_likeliest(flat):
    assert ranks(*flat, temperature=1.0, top_k=7).max() < 7
    half = ranks(*flat, temperature=1.0, top_p=0.5)
    assert 50 < half.max() < 200


def test_a_saved_configuration_changes_nothing_but_where_texts_end(flat):
    model, tokenizer = flat
    greedy = sample_text(model, tokenizer, "tin", tokens=8, temperature=0)
    warm = sample_text(model, tokenizer, "tin", tokens=8, temperature=1.0, seed=3)
    saved = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        num_beams=3,
        max_length=2,
        suppress_tokens=list(range(3, 200)),
        eos_token_id=[1, 2],
    )
    try:
        assert sample_text(model, tokenizer, "tin", tokens=8, temperature=0) == greedy
        assert sample_text(model, tokenizer, "tin", tokens=8, temperature=1.0, seed=3) == warm
        (note,) = notes_on_generation(model, tokenizer)
        for asked in ("temperature = 0.1", "top_k = 1", "repetition_penalty = 9.0", "not used"):
            assert asked in note
        with plain_generation(model):
            assert model.generation_config.eos_token_id == [1, 2]
        assert model.generation_config.num_beams == 3
    finally:
        model.generation_config = saved
    assert notes_on_generation(model, tokenizer) == []


def test_a_prompts_beginning_is_said(make_tokenizer, flat):
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")
    assert notes_on_generation(flat[0], tokenizer) == ["the prompt begins with <s> (the tokenizer's template)"]
    assert notes_on_generation(flat[0], flat[1], "<pad>") == ["the prompt begins with <pad> (as asked)"]


@pytest.mark.parametrize("option", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_impossible_sampling_is_named(flat, option):
    with pytest.raises(UserError, match="the temperature must be 0 or more, top_k at least 1, top_p more than 0"):
        sample_text(*flat, "tin", tokens=1, **option)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_does_not_take_is_named(flat, seed):
    with pytest.raises(UserError, match=f"seed is {seed}; it must fit into 64 bits"):
        sample_text(*flat, "tin", tokens=1, seed=seed)


CHATML = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
CHATML += "{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def chatting(make_tokenizer):
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")  # a template of its own, which a chat does without
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_chat_is_what_the_template_writes_and_the_answer_alone_is_returned(flat, chatting):
    model, _ = flat
    read = chatting("[user] tin</s>[assistant] ", add_special_tokens=False).input_ids
    expected = model.generate(torch.tensor([read]), max_new_tokens=6, do_sample=False)[0, len(read) :]
    answer = sample_text(model, chatting, "tin", tokens=6, temperature=0, chat=True)
    assert answer == chatting.decode(expected, skip_special_tokens=True)
    assert answer  # the comparison is of something
    assert _ids(model, chatting, chat=True)[: len(read)] == read
    assert notes_on_generation(model, chatting) != notes_on_generation(model, chatting, chat=True) == []


def test_a_chat_that_cannot_be_written_says_why(flat, chatting, make_tokenizer):
    model, _ = flat
    with pytest.raises(UserError, match="no chat template: leave out --chat"):
        sample_text(model, make_tokenizer(), "tin", tokens=1, chat=True)
    with pytest.raises(UserError, match="leave out one of --document-start and --chat"):
        sample_text(model, chatting, "tin", tokens=1, chat=True, document_start="none")
    chatting.chat_template = "{{ raise_exception('no questions') }}"
    with pytest.raises(UserError, match="refuses these messages: no questions: leave out --chat"):
        sample_text(model, chatting, "tin", tokens=1, chat=True)
