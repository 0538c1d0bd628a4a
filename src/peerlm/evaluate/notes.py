"""What a reader of a model's figures or text should know beyond them."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peerlm.evaluate.sample import ignored_settings
from peerlm.marks import AUTO, marked, marks_of


def notes_on(model: nn.Module, *, windows_per_pass: int) -> list[str]:
    """Sentences about the figures of a model that was read with this many windows in a forward pass."""
    if not _chooses_among_tokens(model):
        return []
    return [
        "experts choose among all tokens of a forward pass, and so the model sees the future: figures are too good "
        f"and depend on which windows share a pass (here up to {windows_per_pass})"
    ]


def notes_on_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document_start: str = AUTO, *, chat: bool = False
) -> list[str]:
    """Sentences about what `sample_text` does with a model: what stands before the prompt, and what is not used."""
    notes = []
    marks = marks_of(model, tokenizer, document_start)
    if marks.prompt_start and not chat:
        notes.append(f"the prompt begins with {marked(marks.prompt_start, tokenizer)} ({marks.source})")
    if settings := ignored_settings(model):
        given = ", ".join(f"{name} = {value}" for name, value in settings.items())
        notes.append(f"the model's generation_config.json asks for {given}; not used: the options alone decide")
    if _chooses_among_tokens(model):
        notes.append(
            "experts choose among all tokens of a forward pass: the model was not trained to write token by token"
        )
    return notes


def _chooses_among_tokens(model: nn.Module) -> bool:
    return any(getattr(module, "chooses_among_tokens", False) for module in model.modules())
