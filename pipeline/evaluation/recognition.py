"""Word errors of speech recognition: by kind, by a column of the data, the worst texts, and the best of n samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from datasets import Dataset
from nltk.metrics.distance import edit_distance_align

from pipeline.evaluation.decodings import expected_best
from pipeline.metrics import Metric
from pipeline.metrics.error_rate import ErrorRateMetric

WORST = 10  # examples that are listed
MOST_GROUPS = 50  # values of a column; of more, such as the name of each clip, there is no table
SPEAKER = "speaker"


@dataclass(frozen=True)
class WordErrors:
    """Edits that make the reference of a text, by kind, and the words of the reference."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    @property
    def edits(self) -> int:
        """Return all edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Return the word error rate in per cent; lower is better."""
        return 100 * self.edits / max(1, self.words)

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class WorstText:
    """A text with many errors: its row, reference and hypothesis as the metric compares them, and its edits."""

    index: int
    reference: str
    hypothesis: str
    edits: int


@dataclass(frozen=True)
class Recognition:
    """A system's word errors over the test set, those of the rows of each value of `column`, and its worst texts.

    `oracle` is the expected WER of the best of 1, 2, ... n samples, chosen by knowing the reference, over the first
    prompts; empty without samples.
    """

    total: WordErrors
    wer: float
    column: str | None = None
    groups: dict[str, WordErrors] = field(default_factory=dict)
    worst: list[WorstText] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)


def word_metric(metrics: Sequence[Metric]) -> ErrorRateMetric | None:
    """Return the WER of a report; None where it has none."""
    return next((m for m in metrics if isinstance(m, ErrorRateMetric) and m.name == "wer"), None)


def recognition_errors(
    texts: Mapping[str, Sequence[str]],
    samples: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    metric: ErrorRateMetric | None,
    rows: Dataset,
    column: str | None,
    copies: int,
) -> dict[str, Recognition]:
    """Count the word errors of every system's texts against the references; nothing without a WER.

    Of several references of a row the one with the fewest errors counts, as for the metric.

    Rows are grouped by `column`, else by the column `speaker` where there is one. The `samples` of a system are
    `copies` for each of the first prompts, one after the other.
    """
    if metric is None:
        return {}
    column = column or (SPEAKER if SPEAKER in rows.column_names else None)
    labels = None if column is None else list(map(str, rows[column]))
    if labels is not None and len(set(labels)) > MOST_GROUPS:
        column = labels = None
    recognitions = {}
    for name, written in texts.items():
        recognitions[name] = _recognition(written, references, metric, column, labels)
        if samples.get(name):
            oracle = _oracle_rates(samples[name], references, metric, copies)
            recognitions[name] = replace(recognitions[name], oracle=oracle)
    return recognitions


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> WordErrors:
    """Align two texts by as few edits as possible, and count the edits by kind."""
    path = edit_distance_align(list(reference), list(hypothesis))
    kinds = {(1, 1): 0, (1, 0): 0, (0, 1): 0}
    for (i, j), (k, n) in pairwise(path):
        step = (k - i, n - j)
        if step != (1, 1) or reference[i] != hypothesis[j]:
            kinds[step] += 1
    return WordErrors(kinds[1, 1], kinds[1, 0], kinds[0, 1], len(reference))


def _recognition(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    metric: ErrorRateMetric,
    column: str | None,
    labels: Sequence[str] | None,
) -> Recognition:
    compared = zip(metric.closest(texts, references), texts, strict=True)
    pairs = [(metric.normalise(reference), metric.normalise(text)) for reference, text in compared]
    errors = [count_errors(metric.split(reference), metric.split(text)) for reference, text in pairs]
    total = sum(errors, WordErrors())
    groups: dict[str, WordErrors] = {}
    for label, error in zip(labels or (), errors, strict=labels is not None):
        groups[label] = groups.get(label, WordErrors()) + error
    order = sorted(range(len(errors)), key=lambda row: (-errors[row].edits, row))
    worst = [WorstText(row, *pairs[row], errors[row].edits) for row in order[:WORST] if errors[row].edits]
    return Recognition(total, total.rate, column, dict(sorted(groups.items())), worst)


def _oracle_rates(
    samples: Sequence[str], references: Sequence[Sequence[str]], metric: ErrorRateMetric, copies: int
) -> list[float]:
    """Estimate the WER of the best of 1, 2, ... `copies` samples of each prompt, in per cent."""
    prompts = len(samples) // copies
    edits, units = metric.statistics(samples, [texts for texts in references[:prompts] for _ in range(copies)]).T
    groups = [(-edits[start : start + copies]).tolist() for start in range(0, prompts * copies, copies)]
    words = max(1.0, float(units.sum()) / copies)
    return [100 * abs(value) * prompts / words for value in expected_best(groups)]
