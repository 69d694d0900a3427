"""Whether one system is better than another on the same examples: the paired bootstrap.

Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004). Both systems are scored on the
same resamples of the examples, so what makes an example easy or hard for both cancels out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics import Metric
from pipeline.metrics.resampling import bootstrap_indices, percentile_interval, resampled_means, with_full_set

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """System B against system A on the metric's corpus scale.

    `delta` is the score of B minus that of A over all examples; `low` and `high` are its 95 % percentile interval.
    `p_value` is two-sided: how often a difference at least this large would turn up if the systems were equally good.
    """

    delta: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    metric: Metric,
    predictions_a: Sequence[str],
    predictions_b: Sequence[str],
    references: Sequence[Sequence[str]],
    n_resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare the predictions (N texts each) of two systems against `references` (N lists of texts).

    Where `metric.higher_is_better` is false (TER), a negative delta means that B is better.

    Raises:
        ValueError: no examples, unequal lengths, fewer than one resample, or examples that the metric refuses.
    """
    indices = with_full_set(_indices(len(references), n_resamples, seed))
    scores_a = metric.resampled_scores(predictions_a, references, indices)
    scores_b = metric.resampled_scores(predictions_b, references, indices)
    return _compare(scores_b - scores_a, len(references))


def paired_bootstrap_means(
    values_a: Sequence[float], values_b: Sequence[float], n_resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Compare the means of two systems' numbers [N] for the same examples, rewards for one.

    Raises:
        ValueError: no examples, unequal lengths, fewer than one resample, or a number that is not finite.
    """
    if len(values_a) != len(values_b):
        raise ValueError(f"the systems need values for the same examples, found {len(values_a)} and {len(values_b)}")
    indices = with_full_set(_indices(len(values_a), n_resamples, seed))
    differences = np.asarray(values_b, dtype=np.float64) - np.asarray(values_a, dtype=np.float64)
    if not np.isfinite(differences).all():
        first = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise ValueError(f"the values of example {first} are not finite: {values_a[first]} and {values_b[first]}")
    return _compare(resampled_means(differences, indices), len(differences))


def _indices(n_examples: int, n_resamples: int, seed: int) -> np.ndarray:
    if n_resamples < 1:
        raise ValueError(f"a paired bootstrap needs at least one resample, found {n_resamples}")
    return bootstrap_indices(n_examples, n_resamples, seed)


def _compare(differences: np.ndarray, n_examples: int) -> Comparison:
    """`differences` [R + 1]: over all examples, then over each resample."""
    delta, resampled = float(differences[0]), differences[1:]
    low, high = percentile_interval(resampled, CONFIDENCE)
    # Around their own mean the resampled differences scatter as they would if the systems were equally good. The test
    # counts the observed difference as one of the scatter, so that p is never 0.
    extreme = np.abs(resampled - resampled.mean()) >= abs(delta)
    p_value = (1 + int(extreme.sum())) / (len(resampled) + 1)
    # A handful of examples scatters too little: from a single one, any difference would be certain. Were the systems
    # equally good, the signs of N differences would all agree with probability 2^(1 - N), so p is not below that.
    return Comparison(delta, low, high, max(p_value, 2.0 ** (1 - n_examples)))
