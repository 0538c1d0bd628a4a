"""Perplexity, prediction of last words, use of experts, and samples of a language model."""

from peerlm.evaluate.copying import CopyCounts, copy_probe
from peerlm.evaluate.held_out import held_out_loss
from peerlm.evaluate.lambada import LastWordScore, score_last_words
from peerlm.evaluate.loading import load_model
from peerlm.evaluate.notes import notes_on_generation
from peerlm.evaluate.perplexity import TextScore, score_text, score_tokens
from peerlm.evaluate.run import evaluate
from peerlm.evaluate.sample import sample_text

__all__ = [
    "CopyCounts",
    "LastWordScore",
    "TextScore",
    "copy_probe",
    "evaluate",
    "held_out_loss",
    "load_model",
    "notes_on_generation",
    "sample_text",
    "score_last_words",
    "score_text",
    "score_tokens",
]
