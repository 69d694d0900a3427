"""The report on a reward model as report.json, report.md, report.html and tables in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Console

from pipeline.evaluation.curves import read_panels
from pipeline.evaluation.pages import plots
from pipeline.evaluation.pages.page import (
    environment,
    markdown_page,
    page_parts,
    print_table,
    print_text,
    write_json,
    write_page,
)
from pipeline.evaluation.pages.tables import MISSING, Table
from pipeline.evaluation.reward_quality import RewardReport, ScoredPair
from pipeline.models.text import plain_text
from pipeline.rewards.pairs import Pair

SHOWN_PAIRS = 20


def write_reward_report(
    report: RewardReport, pairs: Sequence[Pair], scored: Sequence[ScoredPair], stage: Path, title: str
) -> None:
    """Write the report to `<stage>/report`; `pairs` are held out, `scored` has their raw scores."""
    directory = stage / "report"
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    tables = reward_tables(report, pairs, scored)
    write_json(report, directory / "report.json")
    (directory / "report.md").write_text(markdown_page(title, report, tables), encoding="utf-8")
    drawn = {
        "reliability": plots.reliability_plot(report.reliability),
        "scores": plots.pair_score_plot(scored, report.shift, report.scale),
    }
    panels = [panel for panel in read_panels(stage.parent) if panel.stage == "reward"]
    if panels:
        drawn["curves-reward"] = plots.curve_plot(panels)
    for name, svg in drawn.items():
        write_page(svg, directory / "plots" / f"{name}.svg")
    page = environment().get_template("reward.html")
    figures = [Markup(svg) for svg in drawn.values()]
    content = page.render(report=report, tables=tables, figures=figures, **page_parts(title))
    write_page(content, directory / "report.html")


def print_reward_report(report: RewardReport, console: Console) -> None:
    """Print accuracy, correlations, warnings and the verdict in the terminal."""
    print_table(accuracy_table(report), console)
    print_table(correlation_table(report), console)
    for warning in report.warnings:
        print_text(f"warning: {warning}", console, "yellow")
    print_text(report.verdict, console, "bold")


def reward_tables(report: RewardReport, pairs: Sequence[Pair], scored: Sequence[ScoredPair]) -> list[Table]:
    """Make all tables about the reward model, accuracy first."""
    return [
        accuracy_table(report),
        reliability(report),
        correlation_table(report),
        Table("Pairs", ["", "pairs"], [[key, str(value)] for key, value in _flat(report.pairs)]),
        pair_table(report, pairs, scored),
        Table("Settings", ["", ""], [[key, str(value)] for key, value in _flat(report.settings)]),
    ]


def pair_table(report: RewardReport, pairs: Sequence[Pair], scored: Sequence[ScoredPair]) -> Table:
    """Make the table of the first held-out pairs with their calibrated scores."""
    rows = []
    for pair, scores in zip(pairs[:SHOWN_PAIRS], scored[:SHOWN_PAIRS], strict=True):
        calibrated = [(raw - report.shift) / report.scale for raw in (scores.chosen_score, scores.rejected_score)]
        rows.append([plain_text(pair.prompt), pair.chosen, pair.rejected, *(f"{score:+.2f}" for score in calibrated)])
    return Table("Held-out pairs", ["prompt", "chosen", "rejected", "score of chosen", "score of rejected"], rows)


def accuracy_table(report: RewardReport) -> Table:
    """Make the table of the reward model and the trivial rules on the held-out pairs."""
    others = [report.fresh_accuracy, report.ppo_accuracy, report.training_accuracy]
    shares = [report.accuracy, *report.rules, *(other for other in others if other is not None)]
    rows = [[s.name, f"{s.value:.1%}", f"[{s.low:.1%}, {s.high:.1%}]", str(s.count), str(s.clusters)] for s in shares]
    note = (
        "Share of the pairs in which the better text wins, with its 95 % interval; a tie counts half. Pairs of one "
        "prompt are a cluster. The held-out pairs here did not choose the checkpoint. Prompts that PPO answers: of "
        "held-out and training pairs."
    )
    return Table("Accuracy", ["", "accuracy", "interval", "pairs", "prompts"], rows, note)


def reliability(report: RewardReport) -> Table:
    """Make the table of predicted and observed frequencies."""
    rows = [
        [f"{r.low:.1f} to {r.high:.1f}", str(r.count), f"{r.predicted:.1%}", f"{r.observed:.1%}"]
        for r in report.reliability
    ]
    note = f"Expected calibration error {report.calibration_error:.1%}. A margin in the loss makes differences larger."
    return Table("Reliability", ["predicted", "pairs", "mean prediction", "right"], rows, note)


def correlation_table(report: RewardReport) -> Table:
    """Make the table of the score's correlations with metrics and length."""
    rows = [
        [
            c.name,
            *(MISSING if v is None else f"{v:+.3f}" for v in (c.pearson, c.spearman, c.within_prompt)),
            str(c.count),
        ]
        for c in report.correlations
    ]
    header = ["score against", "Pearson", "Spearman", "within prompts", "texts"]
    return Table("Correlations", header, rows, "Held-out texts. Within prompts: after subtracting each prompt's mean.")


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}: ") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
