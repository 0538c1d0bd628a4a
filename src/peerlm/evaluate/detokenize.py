"""Tokenised text as people write it: WikiText's ` @-@ `, and spaces before punctuation.

Perplexities of WikiText-103 were published for words as its tokenised form has them. A model of bytes or sub-words
reads written text better than ` @-@ `. So published figures are of text that was put back first (Radford 2019, section
3.1). Its nats are divided by the words, or bytes, of the tokenised form.
"""

import re

# In order; each joins what the tokenizer of WikiText took apart. `<unk>` stays: what it stands for is lost.
_RULES = tuple(
    (re.compile(pattern), joined)
    for pattern, joined in (
        (r" @([-,.])@ ", r"\1"),  # well @-@ known, 1 @,@ 000, 3 @.@ 5
        (r'" ([^"\n]*?) "', r'"\1"'),  # quotations, within a line
        (r" (n't|'(?:s|t|d|m|re|ve|ll)\b)", r"\1"),  # the lamp 's light, did n't, didn 't
        (r"(?<=s) '(?=\s|$)", r"'"),  # the keepers ' house
        (r"([(\[{£$]) ", r"\1"),
        (r" ([)\]}%,;:.!?])(?=[\s)\]}\"',;:.!?]|$)", r"\1"),
        (r"(?m)^ +| +$", ""),
    )
)


def detokenize(text: str) -> str:
    """Undo WikiText's tokenisation, as far as rules can tell; text that is not tokenised stays as it is, mostly."""
    for pattern, joined in _RULES:
        text = pattern.sub(joined, text)
    return text
