"""Write the report: report.json for machines, report.md for a pull request, report.html, plots, the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Console

from pipeline.evaluation.assemble import Details
from pipeline.evaluation.pages import plots, tables
from pipeline.evaluation.pages.page import (
    environment,
    markdown_page,
    mood,
    page_parts,
    print_table,
    print_text,
    write_json,
    write_page,
)
from pipeline.evaluation.pages.recognition_tables import recognition_tables
from pipeline.evaluation.report import EvaluationReport, ReportExample

SECTIONS = (
    ("scores", "Scores"),
    ("comparisons", "Comparisons"),
    ("decoding", "Decoding"),
    ("errors", "Word errors"),
    ("gains", "Gains"),
    ("tokens", "Tokens"),
    ("training", "Training"),
    ("cost", "Cost"),
    ("samples", "Samples"),
    ("settings", "Settings"),
)


def write_report(report: EvaluationReport, details: Details, directory: Path) -> None:
    """Write report.json, report.md, report.html and plots/*.svg to `directory`."""
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    write_json(report, directory / "report.json")
    (directory / "report.md").write_text(to_markdown(report, details), encoding="utf-8")
    drawn = draw_plots(report, details)
    for name, svg in drawn.items():
        write_page(svg, directory / "plots" / f"{name}.svg")
    write_page(to_html(report, details, drawn), directory / "report.html")


def draw_plots(report: EvaluationReport, details: Details) -> dict[str, str]:
    """Draw every plot that has data; return the SVGs by name."""
    drawn = {"scores": plots.score_plot(report)}
    for stage in dict.fromkeys(panel.stage for panel in details.panels):
        drawn[f"curves-{stage}"] = plots.curve_plot([panel for panel in details.panels if panel.stage == stage])
    if report.best_of:
        drawn["best-of-n"] = plots.best_of_plot(report)
    if report.gains is not None and report.gains.typical:
        gains = [sample.gain for sample in details.examples]
        name = tables.sentence_score_name(report, report.gains.metric)
        drawn["gains"] = plots.gain_plot(report.gains.a, report.gains.b, name, gains)
    return drawn


def to_markdown(report: EvaluationReport, details: Details) -> str:
    """Render the report as Markdown tables."""
    shown = [
        tables.score_table(report),
        tables.comparison_table(report),
        tables.text_table(report),
        tables.decoding_table(report),
        tables.best_of_table(report),
        tables.agreement_table(report),
        *recognition_tables(report),
        *tables.bucket_tables(report),
        tables.cost_table(report),
        sample_table(report, evenly(details.examples, details.num_samples)),
        tables.settings_table(report),
    ]
    return markdown_page("Evaluation", report, shown)


def sample_table(report: EvaluationReport, samples: Sequence[ReportExample]) -> tables.Table:
    """Make the table of a few examples with every system's text."""
    rows = [[s.prompt, s.reference, *(s.texts[name] for name in report.systems)] for s in samples]
    return tables.Table("Samples", ["prompt", "reference", *report.systems], rows)


def to_html(report: EvaluationReport, details: Details, drawn: Mapping[str, str]) -> str:
    """Render the report as one page that loads nothing; all but its own SVG, style and script is escaped."""
    svg = {name: Markup(text) for name, text in drawn.items()}
    content = (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            mood=mood(report.verdict),
            sections=_sections(report, details),
            tables={
                "scores": tables.score_table(report),
                "texts": tables.text_table(report),
                "comparisons": tables.comparison_table(report),
                "decoding": tables.decoding_table(report),
                "best_of": tables.best_of_table(report),
                "agreement": tables.agreement_table(report),
                "errors": recognition_tables(report),
                "buckets": tables.bucket_tables(report),
                "cost": tables.cost_table(report),
                "settings": tables.settings_table(report),
            },
            plots={
                "scores": svg["scores"],
                "best_of": svg.get("best-of-n"),
                "gains": svg.get("gains"),
                "curves": {n.removeprefix("curves-"): plot for n, plot in svg.items() if n.startswith("curves-")},
            },
            score_name=report.gains and tables.sentence_score_name(report, report.gains.metric),
            inspections=details.inspections,
            samples=details.examples,
            listed=evenly(details.examples, details.num_listed),
            **page_parts(f"Evaluation of {report.settings.get('name', 'a run')}"),
        )
    )
    return content.strip() + "\n"


def _sections(report: EvaluationReport, details: Details) -> list[tuple[str, str]]:
    """List anchor and name of every section that has content."""
    there = {
        "comparisons": report.comparisons,
        "decoding": report.decodings or report.best_of,
        "errors": report.recognition,
        "gains": report.gains,
        "tokens": details.inspections,
        "training": details.panels,
        "cost": report.cost,
        "samples": details.num_listed,
    }
    return [(anchor, name) for anchor, name in SECTIONS if there.get(anchor, True)]


def evenly(items: Sequence[ReportExample], count: int) -> list[ReportExample]:
    """Choose `count` items at even distances, or all if there are fewer."""
    count = min(count, len(items))
    return [items[len(items) * number // count] for number in range(count)]


def print_report(report: EvaluationReport, console: Console) -> None:
    """Print scores, comparisons, warnings, findings and the verdict in the terminal."""
    comparisons = tables.comparison_table(report)
    narrow = [row[:6] for row in comparisons.rows]
    print_table(tables.score_table(report), console)
    print_table(tables.Table(comparisons.title, comparisons.header[:6], narrow), console)
    for warning in report.warnings:
        print_text(f"warning: {warning}", console, "yellow")
    for finding in report.findings:
        print_text(finding, console)
    print_text(report.verdict, console, "bold")
