"""Every `peerlm` command that help texts, documents and recipes show, and what is needed to run it for real."""

import json
import lzma
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from peerlm.cli.root import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SHELLS = ("", "sh", "bash", "console", "shell")
SPAN = re.compile(r"`(peerlm [^`]+)`")
OURS = ("recipes/", "results/", "docs/", "src/", "benchmarks/")


@dataclass(frozen=True)
class Shown:
    """A command, and where it stands."""

    line: str
    where: str

    @property
    def words(self) -> list[str]:
        """What a shell makes of it."""
        return shlex.split(self.line, comments=True)

    @property
    def is_whole(self) -> bool:
        """Whether it is to be typed as it is: a span of text may also just name a command or an option of it."""
        names_a_file = any("/" in word or re.search(r"\w\.\w\w", word) for word in self.words[2:])
        return names_a_file or not self.where.endswith("span")


def commands(group: Any, name: str = "peerlm") -> Iterator[tuple[str, Any]]:
    """Every command below a group, and the group, by its full name."""
    yield name, group
    for child, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {child}")


def shown_commands() -> list[Shown]:
    """All of them, each once."""
    found: list[Shown] = []
    for name, command in commands(typer.main.get_command(app)):
        for paragraph in (command.epilog or "").split("\n\n"):
            if (line := paragraph.rpartition("Example: ")[2]).startswith("peerlm "):
                found.append(Shown(line, f"{name} --help"))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        where = document.relative_to(ROOT).as_posix()
        for language, block in FENCE.findall(text):
            lines = block.replace("\\\n", " ").splitlines()
            found += [Shown(line, where) for line in lines if line.startswith("peerlm ") and language in SHELLS]
        found += [Shown(line, f"{where} span") for line in SPAN.findall(FENCE.sub("", text))]
    for recipe in sorted(ROOT.glob("recipes/**/*.*ml")):
        lines = recipe.read_text(encoding="utf-8").splitlines()
        found += [Shown(m[1], recipe.name) for line in lines if (m := re.match(r"#.*?  +(peerlm .*)", line))]
    definition = (ROOT / "results/report.toml").read_text(encoding="utf-8")
    for line in re.findall(r'^command = "(.*)"$', definition, flags=re.MULTILINE):
        found += [Shown(part, "report.toml") for part in line.split("; ") if part.startswith("peerlm ")]
    for source in sorted(ROOT.glob("src/**/*.py")):
        spans = SPAN.findall(source.read_text(encoding="utf-8"))
        found += [Shown(line, f"{source.relative_to(ROOT)} span") for line in spans if "{" not in line]
    found = [Shown(line.strip(), each.where) for each in found for line in each.line.partition("  #")[0].split("; ")]
    return [each for each in {each.line: each for each in found[::-1]}.values() if each.words[1] != "..."]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words name, and its parameters, by the real parser; raises its UsageError."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("peerlm", list(words[1:2]) or ["--help"], resilient_parsing=True)
    name, rest = "peerlm", list(words[1:])
    while hasattr(command, "commands"):
        if rest[0] not in command.commands:
            raise ValueError(f"No such command {rest[0]!r}")
        child, command, rest = command.resolve_command(context, rest)
        name = f"{name} {child}"
        context = command.make_context(child, rest, parent=context, resilient_parsing=hasattr(command, "commands"))
    return name.removeprefix("peerlm "), context.params


def options_of(words: list[str]) -> set[str]:
    """Options that the words name and the command lacks; the command must exist."""
    command: Any = typer.main.get_command(app)
    place = 1
    while hasattr(command, "commands") and place < len(words) and words[place] in command.commands:
        command = command.commands[words[place]]
        place += 1
    assert place > 1, f"there is no command {words[1]!r}"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known


SENTENCE = "Document {n} tells of {n} ships, of their {n} harbours and of one sea. "
TEXT = "\n<|endoftext|>\n".join(SENTENCE.format(n=number) * 2 for number in range(60))


def provide_text(path: Path) -> None:
    """A file of text, passages or choices, by its name, or a folder of one; what the repository has is taken."""
    if path.resolve().is_relative_to(ROOT) and path.is_file():
        return
    assert not path.resolve().is_relative_to(ROOT), f"{path} would be written into the repository"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        path.mkdir(exist_ok=True)
        path = path / "book.txt"
    content = TEXT
    if ".jsonl" in path.name:
        rows = [{"context": "The old keeper lit the", "continuation": "lamp"}] * 3
        documents = [{"text": text} for text in TEXT.split("\n<|endoftext|>\n")]
        content = "".join(json.dumps(row) + "\n" for row in (rows if "lambada" in path.name else documents))
    path.write_bytes(lzma.compress(content.encode()) if path.suffix == ".xz" else content.encode())


def copy(source: Path, target: Path) -> None:
    """Copy a folder, with what is above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target)
