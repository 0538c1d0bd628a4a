"""What wikitext.yaml asks for: the text as written, and what its nats are divided by."""

from peerlm.evaluate.detokenize import detokenize


def written(document: dict[str, str]) -> str:
    """The text to score."""
    return detokenize(document["text"])


def results(document: dict[str, str], scores: tuple[float]) -> dict[str, tuple[float, int]]:
    """Each metric's log-likelihood, and the words or bytes of the tokenised text."""
    words, num_bytes = len(document["text"].split()), len(document["text"].encode())
    (nats,) = scores
    return {"word_perplexity": (nats, words), "byte_perplexity": (nats, num_bytes), "bits_per_byte": (nats, num_bytes)}
