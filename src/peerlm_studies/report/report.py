"""One report from all rows: Markdown with its plots beside it, and one HTML file that needs nothing else."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from peerlm.errors import UserError
from peerlm.files import write_bytes
from peerlm_studies.report.plan import SectionConfig, load_report
from peerlm_studies.report.sections import Section, make_section

PLOTS = "results"
"""Folder of plots beside the report."""
STYLE = """body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222 }
p, li, h1, h2 { overflow-wrap: anywhere }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap }
code { background: #f3f3f3; padding: 0 0.2rem } svg { max-width: 100%; height: auto }"""


def report(definition: str | Path, output: str | Path) -> list[Path]:
    """Build a report (see `load_report`) from the rows that it names.

    The same rows give the same bytes: dates are those of rows, and plots have no other source of names.

    Args:
        definition: TOML file; paths in it start at its root.
        output: folder for results.md, results/ with a plot for each figure as SVG, and results.html.

    Returns:
        The files written.

    Raises:
        UserError: the definition, a recipe or a row cannot be read.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder: name one to write to, which need not exist")
    with mpl.rc_context():
        mpl.rcdefaults()  # a style of the user's would be seen in the plots
        title, markdown, figures = compose(definition)
        drawn = {name: _svg(figure, name) for name, figure in figures.items()}
    (output / PLOTS).mkdir(parents=True, exist_ok=True)
    files = {output / PLOTS / f"{name}.svg": svg.encode() for name, svg in drawn.items()}
    files |= {output / "results.md": markdown.encode(), output / "results.html": _html(title, markdown, drawn)}
    for path, content in files.items():
        write_bytes(path, content)
    return list(files)


def compose(definition: str | Path) -> tuple[str, str, dict[str, Figure]]:
    """What `report` writes, before plots are drawn: the title, the Markdown, and the plots by the names of their files.

    Raises:
        UserError: as `report`.
    """
    plan = load_report(definition)
    titles: dict[str, str] = {}
    for config in plan.section:
        if (slug := _slug(config.title)) in titles:
            raise UserError(
                f"two sections of the report are called {titles[slug]!r} and {config.title!r}, and their plots would "
                "have one name: let them differ in Latin letters or digits"
            )
        titles[slug] = config.title
    root = Path(plan.root)
    sections = [(config, make_section(config, root, plan.settings)) for config in plan.section]
    figures = {
        f"{_slug(config.title)}-{_slug(name)}": figure
        for config, section in sections
        for name, figure in section.figures.items()
    }
    parts = [f"# {plan.title}", plan.intro.strip(), *(_markdown(*section, root) for section in sections)]
    return plan.title, "\n\n".join(part for part in parts if part) + "\n", figures


def _markdown(config: SectionConfig, section: Section, root: Path) -> str:
    parts = [f"## {config.title}", config.question.strip()]
    if not section.rows:
        return "\n\n".join(part for part in [*parts, f"No rows yet: `{config.command}` makes them."] if part)
    parts += [table.strip() for table in section.tables]
    parts += [f"![{name}]({PLOTS}/{_slug(config.title)}-{_slug(name)}.svg)" for name in section.figures]
    parts += [config.says.strip(), _provenance(config, section.rows, root)]
    return "\n\n".join(part for part in parts if part)


def _provenance(config: SectionConfig, rows: Sequence[Mapping[str, Any]], root: Path) -> str:
    """The command, where rows are, their seeds, machines and dates; of rows that state them."""
    files = ", ".join(f"`{file}`" for file in config.rows if (root / file).is_file())
    parts = [f"`{config.command}`", f"rows in {files}"]
    if seeds := sorted({row["seed"] for row in rows if "seed" in row}):
        parts.append(f"seeds {', '.join(map(str, seeds))}")
    machines = {
        f"{machine.get('accelerator') or str(machine['cores']) + ' cores'} ({machine['processor']}), "
        f"torch {machine['torch']}"
        for row in rows
        if isinstance(machine := row.get("machine"), Mapping)
    }
    parts += sorted(machines)
    if dates := sorted({row["date"] for row in rows if "date" in row}):
        parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return "; ".join(parts) + "."


def _svg(figure: Figure, name: str) -> str:
    """A plot as SVG that depends on what is drawn alone; ids are its own, for many share a page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _html(title: str, markdown: str, drawn: Mapping[str, str]) -> bytes:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for name, svg in drawn.items():
        image = re.search(rf'<img src="{PLOTS}/{name}\.svg"[^>]*>', body)
        assert image is not None
        body = body.replace(image.group(), svg[svg.index("<svg") :])
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'  # a phone's own width
    head = f'<meta charset="utf-8">{viewport}<title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}</body></html>\n".encode()


def _slug(text: str) -> str:
    """Text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
