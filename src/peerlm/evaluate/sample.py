"""Sample text from a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from peerlm.chat import chat_ids, check_chat
from peerlm.errors import UserError, check_seed
from peerlm.marks import AUTO, NONE, Marks, marks_of

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "cache_implementation")
"""Of a saved generation configuration: which tokens are which, and what changes no distribution."""


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    document_start: str = AUTO,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
) -> str:
    """The prompt and what the model writes after it; of a chat the answer alone.

    Sampling is by the arguments alone: neither transformers' defaults (the 50 likeliest tokens) nor a saved
    generation_config.json change it; of the latter the tokens that end a text are used.

    Args:
        model, tokenizer: as `load_model` gives them.
        prompt: text to continue; an empty one starts a document.
        tokens: tokens to write at the most; an end-of-text token ends the text sooner.
        temperature: divides the logits before sampling; 0 takes the likeliest token each time.
        top_k: draw from this many likeliest tokens; None from all.
        top_p: draw from the fewest likeliest tokens that together are at least this probable, within (0, 1].
        seed: the same seed gives the same text.
        document_start: what stands before the prompt: "auto", "none" or a token (see `peerlm.marks`). With "auto"
            an end-of-text token that parts documents is put before an empty prompt alone.
        chat: whether the prompt is a user's message of the tokenizer's chat template, which then says what stands
            before it.
        streamer: is handed the tokens while they are written.

    Raises:
        UserError: an argument out of range, nothing to continue, or a chat without a template.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise UserError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: the temperature must be 0 or more, top_k at "
            "least 1, top_p more than 0 and at most 1"
        )
    check_seed(seed)
    if chat:
        ids = _question_ids(tokenizer, prompt, document_start)
    else:
        ids = prompt_ids(tokenizer, prompt, marks_of(model, tokenizer, document_start))
    if not ids:
        raise UserError(f"an empty prompt with --document-start {NONE} leaves nothing to continue; give a prompt")
    input_ids = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    torch.manual_seed(seed)
    with plain_generation(model):
        written = model.generate(  # type: ignore[operator]  # a Tensor as far as nn.Module.__getattr__ declares
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            streamer=streamer,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    return str(tokenizer.decode(written[0, len(ids) if chat else 0 :], skip_special_tokens=True))


def _question_ids(tokenizer: PreTrainedTokenizerBase, question: str, document_start: str) -> list[int]:
    """Token ids of a chat with one message of a user."""
    check_chat(tokenizer, document_start)
    try:
        return chat_ids(tokenizer, [{"role": "user", "content": question}])
    except ValueError as error:
        raise UserError(f"{error}: leave out --chat") from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, marks: Marks) -> list[int]:
    """Token ids of a prompt, begun as a document is; special tokens that it spells out are taken as such."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    start = list(marks.prompt_start if prompt else marks.start)
    return ids if start and ids[: len(start)] == start else start + ids


def ignored_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of a saved generation configuration that `plain_generation` does not use, but for their defaults."""
    given = model.generation_config.to_diff_dict()
    return {
        name: value
        for name, value in given.items()
        if name not in (*KEPT, "transformers_version") and not name.startswith(("_", "output_"))
    }


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within this context `model.generate` knows of the saved configuration only what `KEPT` names."""
    saved = model.generation_config
    model.generation_config = plain_configuration(saved)
    try:
        yield
    finally:
        model.generation_config = saved


def plain_configuration(saved: GenerationConfig) -> GenerationConfig:
    """A generation configuration with what `KEPT` names of another, and nothing else."""
    return GenerationConfig(**{name: value for name in KEPT if (value := getattr(saved, name, None)) is not None})
