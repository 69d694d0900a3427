"""Pages in general: templates with every value escaped, Markdown and terminal tables, JSON."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from pipeline.evaluation.pages.tables import Table

HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_json(content: object, file: Path) -> None:
    """A dataclass as indented JSON."""
    text = json.dumps(asdict(content), indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character as JSON writes it


def markdown_page(title: str, report: object, shown: Sequence[Table]) -> str:
    """Anything with a verdict, findings and warnings as Markdown, above its tables."""
    return (
        visible(environment().get_template("report.md").render(title=title, report=report, tables=shown).strip())
        + "\n"
    )


def write_page(content: str, file: Path) -> None:
    """A page as a file, with nothing in it that a reader could not see."""
    file.write_text(visible(content.strip()) + "\n", encoding="utf-8")


def visible(text: str) -> str:
    """Control characters, marks that turn the direction of writing, and halves of characters as their numbers.

    They can make a text look like another one, and a file that holds a NUL or half of a character cannot be read.
    """
    return HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def page_parts(title: str) -> dict[str, object]:
    """What every page has: title, style, script, and the hash by which the browser knows the script for ours."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"title": title, "style": Markup(style), "script": Markup(script), "script_hash": Markup(digest)}


def environment() -> Environment:
    """Templates whose HTML escapes every value that is not marked as ours."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["cell"] = markdown_cell
    found.filters["line"] = markdown_line
    return found


def markdown_cell(text: str) -> str:
    """A text as one cell of a Markdown table, whatever is in it."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def markdown_line(text: str) -> str:
    """A text as one line of Markdown that holds no HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def mood(verdict: str) -> str:
    """`better`, `worse` or nothing, for the colour of the verdict."""
    return next((word for word in ("better", "worse") if f"is {word}" in verdict), "")


def print_table(table: Table, console: Console) -> None:
    """A table in the terminal; an empty one is left away."""
    if table.rows:
        # Texts: brackets in them are no markup.
        shown = ConsoleTable(title=Text(visible(table.title)))
        for name in table.header:
            shown.add_column(Text(visible(name)))
        for row in table.rows:
            shown.add_row(*(Text(visible(cell)) for cell in row))
        console.print(shown)


def print_line(text: str, console: Console, style: str | None = None) -> None:
    """A line in the terminal as it is: not wrapped where it holds a path, and without markup."""
    console.print(visible(text), style=style, markup=False, soft_wrap=style is None)
