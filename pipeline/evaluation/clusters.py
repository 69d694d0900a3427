"""Examples that belong together, such as the questions of one paragraph: resampling draws whole clusters.

Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8. Examples of one cluster are
alike, so each of them says less than an example of its own. A draw of single examples would be too sure.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.metrics import Metric, Score
from pipeline.metrics.distinct import DistinctMetric
from pipeline.metrics.resampling import bootstrap_indices, centre_resamples, percentile_interval
from pipeline.metrics.types import Rows


@dataclass(frozen=True)
class Clusters:
    """The clusters of N examples: `numbers` [N] has the cluster of each, counted from 0 as they first appear."""

    numbers: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return how many clusters there are."""
        return max(self.numbers, default=-1) + 1

    @property
    def single(self) -> bool:
        """Return whether every example is a cluster of its own."""
        return self.count == len(self.numbers)

    def rows(self, drawn: np.ndarray) -> Rows:
        """Return the example numbers of the clusters `drawn` [R, K]: an array if the R rows are equally long."""
        if self.single:
            return drawn
        members, sizes = np.argsort(self.numbers, kind="stable"), np.bincount(self.numbers)
        starts = np.cumsum(sizes) - sizes
        rows = []
        for row in drawn:
            ends = np.cumsum(sizes[row])
            # The members of a drawn cluster stand in `members` from its start on.
            rows.append(members[np.arange(ends[-1]) + np.repeat(starts[row] - ends + sizes[row], sizes[row])])
        return np.array(rows) if len(set(map(len, rows))) == 1 else rows

    def rows_with_full_set(self, drawn: np.ndarray) -> Rows:
        """Return `rows` below a row with every example once, so that one pass scores both."""
        everything, rows = np.arange(len(self.numbers)), self.rows(drawn)
        if isinstance(rows, np.ndarray) and rows.shape[1] == len(everything):
            return np.vstack([everything, rows])
        return [everything, *rows]

    def rows_without_each(self) -> Rows:
        """Return the example numbers without those of each cluster in turn."""
        numbers = np.array(self.numbers)
        rows = [np.flatnonzero(numbers != number) for number in range(self.count)]
        return np.array(rows) if self.single else rows


def cluster_by(labels: Sequence[object]) -> Clusters:
    """Put examples with equal labels (values of JSON, dates, decimal numbers) into one cluster."""
    numbers: dict[str, int] = {}
    names = (json.dumps(label, sort_keys=True, default=str) for label in labels)
    return Clusters(tuple(numbers.setdefault(name, len(numbers)) for name in names))


def single_examples(n_examples: int) -> Clusters:
    """Make a cluster of every example."""
    return Clusters(tuple(range(n_examples)))


def clustered_score(
    metric: Metric,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    clusters: Clusters,
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> Score:
    """Score all examples by `metric`, with a percentile interval from resamples of the clusters."""
    score = metric.corpus_score(predictions, references, n_bootstrap=0)
    rows = clusters.rows(bootstrap_indices(clusters.count, n_bootstrap, seed))
    scores = metric.resampled_scores(predictions, references, rows)
    scores = centre_resamples(scores, score.value) if isinstance(metric, DistinctMetric) else scores
    low, high = percentile_interval(scores, confidence)
    resampling = f"bs:{n_bootstrap}|seed:{seed}|clusters:{clusters.count}"
    return replace(score, low=low, high=high, signature=f"{resampling}|{score.signature}")


def sizes_text(examples: int, clusters: int) -> str:
    """Write how many examples there are, and in how many clusters where these are fewer."""
    return f"{examples:,} examples" + (f" in {clusters:,} clusters" if clusters < examples else "")
