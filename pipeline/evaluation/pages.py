"""Pages in general: templates with every value escaped, Markdown and terminal tables, JSON."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as ConsoleTable

from pipeline.evaluation.tables import Table

TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_json(content: object, file: Path) -> None:
    """A dataclass as indented JSON."""
    file.write_text(json.dumps(asdict(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown_page(title: str, report: object, shown: Sequence[Table]) -> str:
    """Anything with a verdict, findings and warnings as Markdown, above its tables."""
    return environment().get_template("report.md").render(title=title, report=report, tables=shown).strip() + "\n"


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
    return found


def markdown_cell(text: str) -> str:
    """A text as one cell of a Markdown table, whatever is in it."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def mood(verdict: str) -> str:
    """`better`, `worse` or nothing, for the colour of the verdict."""
    return next((word for word in ("better", "worse") if f"is {word}" in verdict), "")


def print_table(table: Table, console: Console) -> None:
    """A table in the terminal; an empty one is left away."""
    if table.rows:
        shown = ConsoleTable(*table.header, title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
