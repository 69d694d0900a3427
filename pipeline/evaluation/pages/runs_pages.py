"""The comparison of runs as tables and pages."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

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
from pipeline.evaluation.pages.tables import MISSING, Table, duration
from pipeline.evaluation.power import p_cell, p_text
from pipeline.evaluation.run_files import Run, load_run
from pipeline.evaluation.runs import RunsReport, compare_runs

TABLE_WIDTH = 130  # columns of the widest table: a narrower terminal wraps its lines, where it would cut its figures


def write_comparison(paths: Sequence[Path], output: Path) -> RunsReport:
    """Write report.json, report.md and report.html to `output`, and print the tables.

    Raises:
        ValueError: fewer than two runs, one given twice, or one without a finished evaluation.
    """
    if len({path.resolve() for path in paths}) != len(paths) or len(paths) < 2:
        raise ValueError(f"give two or more different run directories, found {', '.join(map(str, paths))}")
    runs = [load_run(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, label=str(run.path)) for run in runs]
    report = compare_runs(runs)
    shown, title = comparison_tables(runs, report), f"Comparison of {', '.join(report.runs)}"
    output.mkdir(parents=True, exist_ok=True)
    write_json(report, output / "report.json")
    (output / "report.md").write_text(markdown_page(title, report, shown), encoding="utf-8")
    page = environment().get_template("runs.html")
    content = page.render(report=report, tables=shown, mood=mood(report.verdict), **page_parts(title))
    write_page(content, output / "report.html")
    console = Console(stderr=True)
    console.width = max(console.width, TABLE_WIDTH)
    for table in shown[:4]:
        print_table(table, console)
    for warning in report.warnings:
        print_text(f"warning: {warning}", console, "yellow")
    print_text(report.verdict, console, "bold")
    print_text(f"comparison: {output / 'report.html'}", console)
    return report


def comparison_tables(runs: Sequence[Run], report: RunsReport) -> list[Table]:
    """Make all tables about the runs, the summary first; tables without rows are not shown."""
    return [
        seeds_table(report),
        gains_table(report),
        pairwise_table(report),
        scores_table(runs),
        differences_table(runs),
        costs_table(runs),
    ]


def seeds_table(report: RunsReport) -> Table:
    """Make the table of the differences over the seeds: of PPO and SFT, and of either and the control."""
    header = [
        "systems",
        "metric",
        "seeds",
        "mean",
        "95 % interval",
        "p",
        "p Holm",
        "t over seeds",
        "std. dev.",
        "ahead",
    ]
    several = len({tuple(s.runs) for s in report.seeds}) > 1
    rows = [
        [
            f"{s.b} - {s.a}",
            f"{s.metric} ({s.runs[0]})" if several else s.metric,
            str(len(s.seeds)),
            f"{s.mean:+.3f}",
            _interval(s.deciding.low, s.deciding.high),
            *map(p_cell, (s.deciding.p_value, s.p_holm)),
            f"{_interval(s.over_seeds.low, s.over_seeds.high)}, {p_text(s.over_seeds.p_value)}",
            f"{s.deviation:.3f}",
            f"{s.ahead:.0%}",
        ]
        for s in report.seeds
    ]
    crossed = [s.over_both is not None for s in report.seeds]
    tests = ["crossed bootstrap over seeds and test examples"] if any(crossed) or not crossed else []
    tests += [] if all(crossed) else ["Student's t over the seeds where texts or scores are missing or of other tests"]
    note = (
        f"Interval and p: {'; '.join(tests)}. t over seeds: Student's t of the "
        "differences, blind to the choice of examples. Holm: corrected for all comparisons of this page. Ahead: share "
        "of seeds in which the first of the two systems has the better score."
    )
    return Table("Over the seeds", header, rows, note)


def _interval(low: float, high: float) -> str:
    return f"[{low:+.3f}, {high:+.3f}]"


def gains_table(report: RunsReport) -> Table:
    """Make the table of PPO - SFT of each run, a column for each measure."""
    metrics = list(dict.fromkeys(gain.metric for gain in report.gains))
    rows = []
    for name in report.runs:
        gains = {gain.metric: gain for gain in report.gains if gain.run == name}
        cells = [f"{gains[m].delta:+.3f} ({p_text(gains[m].p_value)})" if m in gains else MISSING for m in metrics]
        rows.append([name, *cells])
    return Table("PPO - SFT of each run", ["run", *metrics], rows)


def pairwise_table(report: RunsReport) -> Table:
    """Make the table of every run against the first."""
    rows = [
        [
            f"{d.b} - {d.a}",
            d.system,
            d.metric,
            f"{d.delta:+.3f}",
            _interval(d.low, d.high),
            p_cell(d.p_value),
            p_cell(d.p_holm),
        ]
        for d in report.duels
    ]
    header = ["runs", "system", "metric", "difference", "95 % interval", "p", "p Holm"]
    note = "Over the test examples that both runs share, and over seeds where both have several."
    return Table("Against the first run", header, rows, note)


def scores_table(runs: Sequence[Run]) -> Table:
    """Make the table of every system of every run."""
    metrics = list(dict.fromkeys(m for r in runs for s in r.report["systems"].values() for m in s["metrics"]))
    rows = []
    for run in runs:
        for name, system in run.report["systems"].items():
            scores = system["metrics"]
            cells = [f"{scores[m]['value']:.2f}" if m in scores else MISSING for m in metrics]
            figures = [(system["mean_reward"], ".4f"), (system["perplexity"], ".2f"), (system["kl_to_sft"], ".3f")]
            cells += [MISSING if value is None else format(value, form) for value, form in figures]
            rows.append([run.name, name, *cells, f"{system['length']:.1f}"])
    header = ["run", "system", *metrics, "mean reward", "perplexity", "KL to SFT", "length, tokens"]
    return Table("Scores", header, rows)


def differences_table(runs: Sequence[Run]) -> Table:
    """Make the table of the settings that differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        values = [str(run.settings.get(key, MISSING)) for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table("Settings that differ", ["", *(run.name for run in runs)], rows)


def costs_table(runs: Sequence[Run]) -> Table:
    """Make the table of the time of every stage."""
    stages = list(dict.fromkeys(c["stage"] for run in runs for c in run.report.get("cost", [])))
    rows = []
    for run in runs:
        seconds = {c["stage"]: c["seconds"] for c in run.report.get("cost", []) if c["seconds"] is not None}
        rows.append([run.name, *(duration(seconds[s]) if s in seconds else MISSING for s in stages)])
    return Table("Time", ["run", *stages], rows if stages else [])
