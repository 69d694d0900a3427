"""The tables of word errors: by kind, by a column of the data, and the worst texts."""

from pipeline.evaluation.pages.tables import MISSING, Table
from pipeline.evaluation.report import EvaluationReport


def recognition_tables(report: EvaluationReport) -> list[Table]:
    """Make the tables of a report with a WER; none without."""
    if not report.recognition:
        return []
    return [_kinds_table(report), *_group_tables(report), _worst_table(report)]


def _kinds_table(report: EvaluationReport) -> Table:
    rows = []
    for system, recognition in report.recognition.items():
        total, oracle = recognition.total, recognition.oracle
        counts = (total.words, total.substitutions, total.deletions, total.insertions)
        best = f"{oracle[-1]:.2f} (n = {len(oracle)})" if oracle else MISSING
        rows.append([system, f"{recognition.wer:.2f}", *map(str, counts), best])
    header = ["system", "WER, %", "words", "substitutions", "deletions", "insertions", "oracle WER, %"]
    note = (
        "Lower is better. A deletion is a word of the reference that the text lacks, an insertion one that only the "
        "text has. The oracle chooses the best of n samples by knowing the reference."
    )
    return Table("Word errors by kind", header, rows, note)


def _group_tables(report: EvaluationReport) -> list[Table]:
    systems = report.recognition
    first = next(iter(systems.values()))
    if first.column is None:
        return []
    rows = [
        [value, str(errors.words), *(f"{recognition.groups[value].rate:.2f}" for recognition in systems.values())]
        for value, errors in first.groups.items()
    ]
    return [Table(f"WER by {first.column}, %", [first.column, "words", *systems], rows, "Lower is better.")]


def _worst_table(report: EvaluationReport) -> Table:
    name = "ppo" if "ppo" in report.recognition else next(reversed(report.recognition))
    rows = [
        [str(text.index), str(text.edits), text.reference, text.hypothesis] for text in report.recognition[name].worst
    ]
    header, note = ["row", "errors", "reference", "hypothesis"], "The first row of the test data is 0."
    return Table(f"Texts of {name} with the most errors", header, rows, note)
