"""A study over many machines: each makes its share of the rows in a file of its own, and files are read together."""

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from peerlm.errors import UserError
from peerlm_studies.rows import read_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of several equal shares of a study's rows."""

    number: int
    """From 1."""
    count: int

    @classmethod
    def read(cls, text: str | None) -> "Shard | None":
        """The shard of a text such as "2/8"; raises UserError for another, and gives None for None."""
        if text is None:
            return None
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None:
            raise UserError(f"--shard {text!r}: write the number of the share and how many there are, as in 2/8")
        number, count = map(int, match.groups())
        if not 1 <= number <= count:
            raise UserError(f"--shard {text}: shares of {count} are numbered 1 to {count}")
        return cls(number, count)

    @property
    def name(self) -> str:
        """As part of the name of a file."""
        return f"{self.number}-of-{self.count}"

    def share(self, items: Iterable[T], key: Callable[[T], Hashable]) -> list[T]:
        """Every count-th of the items, in their order; those of one key count once and stay together.

        It depends on the items alone, so that shares together are all items, and have no key in common.
        """
        numbers: dict[Hashable, int] = {}
        of_key = ((item, numbers.setdefault(key(item), len(numbers))) for item in items)
        return [item for item, number in of_key if number % self.count == self.number - 1]


def rows_file(folder: Path, shard: Shard | None = None) -> Path:
    """Where a study appends its rows."""
    return folder / ("rows.jsonl" if shard is None else f"rows.{shard.name}.jsonl")


def read_study(folder: Path) -> list[dict[str, Any]]:
    """The rows of a study's folder: of rows.jsonl, then of every shard those whose keys no file before has.

    Raises:
        UserError: a line in the middle of a file is not JSON.
    """
    found: list[dict[str, Any]] = []
    shards = sorted(path for path in folder.glob("rows.*.jsonl") if re.fullmatch(r"rows\.\d+-of-\d+\.jsonl", path.name))
    for path in (rows_file(folder), *shards):
        before = {row["key"] for row in found}
        found += [row for row in read_rows(path) if row["key"] not in before]
    return found


def say_incomplete(lacking: int, output: Path, console: Console) -> None:
    """Say of a shard's end what is to be done for tables and plots."""
    console.print(
        f"{lacking} rows of other shards are not in {output} yet: bring their files rows.*.jsonl there, and run the "
        "command without --shard for tables and plots.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
