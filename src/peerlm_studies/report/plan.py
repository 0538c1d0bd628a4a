"""What a report consists of: a TOML file that names, section by section, rows, the recipe they belong to, and words."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from peerlm.errors import UserError
from peerlm.train.recipe import from_dict, read_recipe


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """A plot of a measure over a setting, a line per other setting."""

    x: tuple[str, ...] = ()
    """Keys whose product is drawn over: of a row's configuration, or with kind "table" of the row; empty: labels, as a
    list from best to worst."""
    by: tuple[str, ...] = ("method",)
    """Keys whose values tell lines apart."""
    y: str = "perplexity"
    """What is drawn: "perplexity", held-out, or with kind "table" a key of the row."""
    xlabel: str = ""
    """Text at the axis; the keys if empty."""


@dataclass(frozen=True, kw_only=True)
class SectionConfig:
    """One section of a report."""

    title: str
    """Its heading."""
    kind: Literal["isoflop", "comparison", "table", "scaling", "frontier", "seconds"]
    """What rows are: of `peerlm isoflop`, of `peerlm compare`, any others, the file of `peerlm scaling`, of the first
    two, drawn over what they cost (`peerlm frontier`), or of `peerlm seconds`."""
    rows: tuple[str, ...]
    """Files of rows; those that do not exist yet count as empty."""
    settings: tuple[str, ...] = ()
    """Changes to the recipe with which the rows were made, as --set takes them, besides those of the whole report."""
    command: str
    """What made the rows."""
    recipe: str = ""
    """The recipe that the rows belong to; rows of other runs in the files are left out. Empty: all rows of a
    comparison count."""
    speeds: str = ""
    """With kind "isoflop": a file of rows of `peerlm_studies.isoflop.cost`; seconds are then what a run's tokens
    take at the speed of its method and size there. Empty, or no such rows: the runs' own. With kind "seconds": the file
    of speeds that the runs were made at."""
    question: str = ""
    """What was asked, above the table."""
    says: str = ""
    """What the rows answer, below the plot."""
    columns: tuple[str, ...] = ()
    """With kind "table": the keys that are shown; empty: all of the first row's."""
    plot: PlotConfig | None = None
    """With kind "comparison" or "table": what is drawn."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError(f"section {self.title!r} of the report names no rows: add rows = [...]")
        if self.kind in ("isoflop", "seconds") and not self.recipe:
            raise UserError(f"section {self.title!r} of the report names no recipe: add recipe = ...")
        if self.kind == "seconds" and not self.speeds:
            raise UserError(f"section {self.title!r} of the report names no speeds: add speeds = ...")
        if self.kind == "table" and self.plot is not None and not self.plot.x:
            raise UserError(f"section {self.title!r} of the report draws a table over nothing: add plot.x = [...]")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A report: a title, words before everything, sections."""

    title: str
    """Heading of the whole."""
    section: tuple[SectionConfig, ...]
    """In order."""
    intro: str = ""
    """Markdown after the heading."""
    root: str = "."
    """Folder that all paths start at; a relative one starts at the folder of this file."""
    settings: tuple[str, ...] = ()
    """Changes to every recipe with which rows were made, as --set takes them: where their text was, which is part of
    what a row is known by."""


def load_report(path: str | Path) -> ReportConfig:
    """Read a report's file, with its root resolved.

    Raises:
        UserError: as `peerlm.train.load_recipe`, a section lacks what it needs, or there is no such root.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: name a report's definition, as results/report.toml")
    config = from_dict(ReportConfig, read_recipe(path))
    root = Path(path).resolve().parent / config.root
    if not root.is_dir():
        raise UserError(f"the root of {path}, {root}, is not a folder: correct root, or leave it out")
    return replace(config, root=str(root))
