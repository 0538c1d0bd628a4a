"""Models whose blocks look up n-grams: with caches, packed texts, and what has no token ids."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from peerlm.model import PeerForCausalLM

Build = Callable[..., PeerForCausalLM]
pytestmark = pytest.mark.usefixtures("float64")


def draw(*shape: int) -> Tensor:
    return torch.randint(1, 64, shape)


def ngram_model(tiny_model: Build, **settings: Any) -> PeerForCausalLM:
    return tiny_model(**({"ffw_layers": ["dense", "hashed_ngrams", "hashed_ngrams+dense"]} | settings)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lazy", "dynamic", "static"])
def test_cached_steps_equal_one_pass(tiny_model: Build, kind: str) -> None:
    model, ids = ngram_model(tiny_model), draw(2, 9)
    cache = {
        "lazy": lambda: DynamicCache(),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=12),
    }[kind]()
    parts = [model(each, past_key_values=cache, use_cache=True).logits for each in ids.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_cache_that_is_cut_and_reordered_is_right(tiny_model: Build) -> None:
    model, ids = ngram_model(tiny_model), draw(2, 9)
    cache = DynamicCache(config=model.config)
    model(torch.cat([ids[:, :5], draw(2, 2)], dim=1), past_key_values=cache, use_cache=True)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = model(ids[[1, 0], 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(ids[[1, 0]]).logits[:, 5:])


@torch.no_grad()
def test_packed_texts_equal_each_alone(tiny_model: Build) -> None:
    model, texts = ngram_model(tiny_model, attn_implementation="eager"), [draw(1, 4), draw(1, 5)]
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    packed = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat([model(text).logits for text in texts], dim=1))


def test_beams_and_left_padding(tiny_model: Build) -> None:
    model = ngram_model(tiny_model)
    prompt = draw(1, 4)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    padded = model.generate(ids, attention_mask=(ids > 0).long(), **settings)
    alone = [model.generate(prompt, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*alone)
    assert torch.equal(padded[:, 3:], alone[0])


def test_what_has_no_token_ids_is_refused(tiny_model: Build) -> None:
    model = ngram_model(tiny_model)
    with pytest.raises(ValueError, match="look up by token ids: pass input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    assert not model._supports_context_parallel
