"""The bootstrap over examples: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13."""

from collections.abc import Sequence

import numpy as np

from pipeline.metrics.checks import check_examples
from pipeline.metrics.types import Metric, Rows, Score


def bootstrap_indices(n_examples: int, n_resamples: int, seed: int) -> np.ndarray:
    """Draw example numbers [n_resamples, n_examples] with replacement; the same for the same arguments.

    Raises:
        ValueError: no examples, or a negative number of resamples.
    """
    if n_examples < 1:
        raise ValueError("there are no examples to score")
    if n_resamples < 0:
        raise ValueError(f"the number of bootstrap resamples must not be negative, found {n_resamples}")
    return np.random.default_rng(seed).choice(n_examples, size=(n_resamples, n_examples), replace=True)


def with_full_set(indices: np.ndarray) -> np.ndarray:
    """Put `indices` [R, N] below a row with every example once [R + 1, N], so that one pass scores both."""
    return np.vstack([np.arange(indices.shape[1]), indices])


def resampled_means(values: Sequence[float], indices: Rows) -> np.ndarray:
    """Return the mean [R] of `values` [N] over each row of `indices` [R, N]."""
    values = np.asarray(values, dtype=np.float64)
    # Row by row: values[indices] at once would hold R x N numbers.
    return np.array([values[row].mean() for row in indices], dtype=np.float64)


def resampled_sums(statistics: np.ndarray, indices: Rows) -> np.ndarray:
    """Return the sum [R, K] of the per-example `statistics` [N, K] over each row of `indices` [R, N]."""
    if not isinstance(indices, np.ndarray):
        return np.array([statistics[row].sum(axis=0) for row in indices])
    totals = np.zeros((len(indices), statistics.shape[1]))
    # Example after example, in order: the order a plain loop over the corpus adds in, so that fractions round alike.
    for column in indices.T:
        totals += statistics[column]
    return totals


def percentile_interval(scores: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of `scores` [R] that leaves (1 - confidence) / 2 on either side.

    Raises:
        ValueError: `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must be between 0 and 1, found {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return float(low), float(high)


def centre_resamples(scores: np.ndarray, value: float) -> np.ndarray:
    """Move resampled scores [R] so that `value` is their mean; for scores that resampling shifts: `DistinctMetric`."""
    return scores - scores.mean() + value


def score_with_interval(
    metric: Metric,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    n_bootstrap: int,
    confidence: float,
    seed: int,
    centre: bool = False,
) -> Score:
    """Score all examples by `metric`, with a percentile interval from `n_bootstrap` resamples; see `centre_resamples`.

    Raises:
        ValueError: examples the metric refuses, a negative `n_bootstrap`, a `confidence` outside (0, 1).
    """
    check_examples(predictions, references)
    indices = with_full_set(bootstrap_indices(len(predictions), n_bootstrap, seed))
    scores = metric.resampled_scores(predictions, references, indices)
    resampled = scores[1:] if n_bootstrap else scores
    low, high = percentile_interval(centre_resamples(resampled, scores[0]) if centre else resampled, confidence)
    counts = {len(texts) for texts in references}
    n_references = counts.pop() if len(counts) == 1 else "var"
    bootstrap = f"bs:{n_bootstrap}|seed:{seed}|" if n_bootstrap else ""
    return Score(float(scores[0]), low, high, f"nrefs:{n_references}|{bootstrap}{metric.signature}")
