"""Tests of one system against another on the same examples: paired tests, effect size, Holm's correction.

Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004). Both systems are scored on the
same resamples of the examples, so what makes an example easy or hard for both cancels out.

p-values of the paired bootstrap differ from those of `sacrebleu --paired-bs` on the same data, which are about half as
large. From the difference d of each resample, sacreBLEU takes abs(d) - mean(abs(d)) and counts how often that exceeds
the observed difference: only resamples that favour the better system can. Here abs(d - mean(d)) is counted, on both
sides. Paired randomisation is the test of `sacrebleu --paired-ar`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics import Metric
from pipeline.metrics.checks import check_examples
from pipeline.metrics.resampling import bootstrap_indices, percentile_interval, resampled_means, with_full_set
from pipeline.runtime.seeds import derive_seed

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


def paired_randomisation(
    metric: Metric,
    predictions_a: Sequence[str],
    predictions_b: Sequence[str],
    references: Sequence[Sequence[str]],
    n_trials: int = 1000,
    seed: int = 0,
) -> float:
    """Compute the two-sided p of approximate randomisation: the systems swap their texts on a random half of the rows.

    Source: Noreen, Computer-Intensive Methods for Testing Hypotheses (1989); Riezler and Maxwell (2005).

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    check_examples(predictions_a, references)
    check_examples(predictions_b, references)
    n = len(references)
    # One pool of texts, matched once: A's, and B's where they differ. A swap is then a choice of rows.
    differing = [i for i in range(n) if predictions_a[i] != predictions_b[i]]
    rows_a, rows_b = np.arange(n), np.arange(n)
    rows_b[differing] = n + np.arange(len(differing))
    pool = [*predictions_a, *[predictions_b[i] for i in differing]]
    pool_references = [*references, *[references[i] for i in differing]]
    swaps = _swaps(n, n_trials, seed)
    rows = np.vstack([rows_a, rows_b, np.where(swaps, rows_b, rows_a), np.where(swaps, rows_a, rows_b)])
    scores = metric.resampled_scores(pool, pool_references, rows)
    return _randomised_p(scores[1] - scores[0], scores[2 + n_trials :] - scores[2 : 2 + n_trials], n)


def paired_randomisation_means(
    values_a: Sequence[float], values_b: Sequence[float], n_trials: int = 1000, seed: int = 0
) -> float:
    """Compute the p of `paired_randomisation` for the means of two systems' numbers [N] for the same examples."""
    differences = np.asarray(values_b, dtype=np.float64) - np.asarray(values_a, dtype=np.float64)
    signs = np.where(_swaps(len(differences), n_trials, seed), -1.0, 1.0)
    return _randomised_p(float(differences.mean()), (signs @ differences) / len(differences), len(differences))


def _swaps(n_examples: int, n_trials: int, seed: int) -> np.ndarray:
    if n_trials < 1:
        raise ValueError(f"a randomisation test needs at least one trial, found {n_trials}")
    return np.random.default_rng(derive_seed(seed, "randomisation test")).random((n_trials, n_examples)) < 0.5


def _randomised_p(delta: float, trials: np.ndarray, n_examples: int) -> float:
    # Sums of floats in another order: a tie must not be lost to rounding.
    extreme = np.abs(trials) >= abs(delta) - 1e-9
    p_value = (1 + int(extreme.sum())) / (len(trials) + 1)
    return max(p_value, 2.0 ** (1 - n_examples))


@dataclass(frozen=True)
class Effect:
    """How large a difference is, example by example: B's numbers minus A's.

    `size` is their mean over their standard deviation (Cohen's d of paired values), 0 where nothing differs and None
    where all differ alike; `wins` and `losses` are the shares of examples on which B is better and worse.
    """

    size: float | None
    wins: float
    losses: float


def paired_effect(values_a: Sequence[float], values_b: Sequence[float]) -> Effect:
    """Compute the effect of B against A on values [N] where more is better."""
    differences = np.asarray(values_b, dtype=np.float64) - np.asarray(values_a, dtype=np.float64)
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    size = mean / deviation if deviation > 1e-12 else None if mean else 0.0
    return Effect(size, float((differences > 1e-9).mean()), float((differences < -1e-9).mean()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method (Holm 1979), in the order given.

    Rejecting those below a level keeps the chance of any false rejection among all of them below that level.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _indices(n_examples: int, n_resamples: int, seed: int) -> np.ndarray:
    if n_resamples < 1:
        raise ValueError(f"a paired bootstrap needs at least one resample, found {n_resamples}")
    return bootstrap_indices(n_examples, n_resamples, seed)


def _compare(differences: np.ndarray, n_examples: int) -> Comparison:
    """Summarise `differences` [R + 1], the first over all examples, the others over each resample."""
    delta, resampled = float(differences[0]), differences[1:]
    low, high = percentile_interval(resampled, CONFIDENCE)
    # Around their own mean the resampled differences scatter as they would if the systems were equally good. The test
    # counts the observed difference as one of the scatter, so that p is never 0.
    extreme = np.abs(resampled - resampled.mean()) >= abs(delta)
    p_value = (1 + int(extreme.sum())) / (len(resampled) + 1)
    # A handful of examples scatters too little: from a single one, any difference would be certain. Were the systems
    # equally good, the signs of N differences would all agree with probability 2^(1 - N), so p is not below that.
    return Comparison(delta, low, high, max(p_value, 2.0 ** (1 - n_examples)))
