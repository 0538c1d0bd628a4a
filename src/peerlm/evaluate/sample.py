"""Text that a model writes."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> str:
    """The prompt and what the model writes after it.

    Args:
        model, tokenizer: as `load_model` gives them.
        prompt: text to go on from; an empty one starts a document.
        tokens: tokens to write at the most; an end-of-text token ends the text sooner.
        temperature: divides the logits before sampling; 0 takes the likeliest token each time.
        seed: the same seed gives the same text.
        streamer: is handed the tokens while they are written.
    """
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    written = model.generate(  # type: ignore[operator]  # a Tensor as far as nn.Module.__getattr__ declares
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
