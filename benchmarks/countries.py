"""Countries of the World Factbook as text to learn, and questions about them in two forms."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from teach import write_text

from peerlm.data import END_OF_TEXT, read_documents
from peerlm_studies.lifelong.facts import articles, choose_countries, questions

_SEPARATOR = f"\n{END_OF_TEXT}\n"
SENTENCES = {
    "Location": "{name} is located in",
    "Capital": "The capital of {name} is",
    "Government type": "The form of government of {name} is:",
    "Climate": "The climate of {name} is",
    "Currency": "In {name}, people pay in",
    "Languages": "In {name}, people speak",
    "Religions": "The religions of {name} are",
    "Independence": "{name} became independent on",
}
"""The same question in words that the text does not have."""


def documents() -> list[str]:
    """The embedded corpus."""
    return list(read_documents(["demo"]))


def chosen(corpus: Sequence[str], number: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """That many countries with their clozes, such as ("Eritrea - Capital:", "Asmara"); values "none" are left out."""
    found = articles(corpus)
    return [
        (name, [each for each in questions(name, found[name]) if each[1] != "none"])
        for name in choose_countries(list(found), number)
    ]


def as_sentence(name: str, cloze: str) -> str:
    """What stands before the value of a cloze when the question is a sentence."""
    return SENTENCES[cloze.removeprefix(f"{name} - ").removesuffix(":")].format(name=name)


def asked(countries: Sequence[tuple[str, list[tuple[str, str]]]]) -> Mapping[str, list[tuple[str, str]]]:
    """All questions: as the text has them, and as sentences."""
    return {
        "cloze": [each for _, clozes in countries for each in clozes],
        "sentence": [(as_sentence(name, cloze), value) for name, clozes in countries for cloze, value in clozes],
    }


def write_lines(path: Path, countries: Sequence[tuple[str, list[tuple[str, str]]]]) -> None:
    """Write what is learned: a document of each country, a line of each cloze and its value."""
    write_text(
        path, _SEPARATOR.join("\n".join(f"{cloze} {value}" for cloze, value in clozes) for _, clozes in countries)
    )


def write_background(path: Path, corpus: Sequence[str]) -> None:
    """Write the corpus without the World Factbook, whose articles begin with a name and the line of its background."""
    kept = (text for text in corpus if not text.strip().partition("\n")[2].startswith("Background: "))
    write_text(path, _SEPARATOR.join(kept))
