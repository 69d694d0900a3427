"""What all pages share: templates with every value escaped, Markdown and terminal tables, JSON."""

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
from rich.text import Text as ConsoleText

from pipeline.evaluation.pages.tables import Table

HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_json(content: object, file: Path) -> None:
    """Write a dataclass as indented JSON."""
    text = json.dumps(asdict(content), indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character as JSON writes it


def markdown_page(title: str, report: object, shown: Sequence[Table]) -> str:
    """Render a report with verdict, findings and warnings, and its tables, as Markdown."""
    return (
        visible(environment().get_template("report.md").render(title=title, report=report, tables=shown).strip())
        + "\n"
    )


def write_page(content: str, file: Path) -> None:
    """Write a page to a file, with hidden characters made visible."""
    file.write_text(visible(content.strip()) + "\n", encoding="utf-8")


def visible(text: str) -> str:
    """Replace control characters, marks that change the writing direction and halves of characters by their numbers.

    They can make a text look like another one, and a file with a NUL or half of a character cannot be read.
    """
    return HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def page_parts(title: str) -> dict[str, object]:
    """Return what every page needs: title, style, script, and the script's hash, which the page's policy allows."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"title": title, "style": Markup(style), "script": Markup(script), "script_hash": Markup(digest)}


def environment() -> Environment:
    """Make the template environment; in HTML it escapes every value that is not marked as safe."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["cell"] = markdown_cell
    templates.filters["line"] = markdown_line
    return templates


def markdown_cell(text: str) -> str:
    """Format any text as one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def markdown_line(text: str) -> str:
    """Format any text as one line of Markdown without HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def mood(verdict: str) -> str:
    """Return `better`, `worse` or an empty text, for the colour of the verdict."""
    return next((word for word in ("better", "worse") if f"is {word}" in verdict), "")


def print_table(table: Table, console: Console) -> None:
    """Print a table in the terminal, unless it is empty."""
    if table.rows:
        # Not plain strings, in which brackets would be markup.
        shown = ConsoleTable(title=ConsoleText(visible(table.title)))
        for name in table.header:
            shown.add_column(ConsoleText(visible(name)))
        for row in table.rows:
            shown.add_row(*(ConsoleText(visible(cell)) for cell in row))
        console.print(shown)


def print_text(text: str, console: Console, style: str | None = None) -> None:
    """Print a line in the terminal without markup; a line without a style is not wrapped, since it may hold a path."""
    console.print(visible(text), style=style, markup=False, soft_wrap=style is None)
