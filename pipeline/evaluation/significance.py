"""Tests of one system against another on the same examples: paired tests, shares of wins, Holm's correction.

Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004). Both systems are scored on the
same resamples of the examples, so what makes an example easy or hard for both cancels out.

p-values of the paired bootstrap differ from those of `sacrebleu --paired-bs` on the same data, which are about half as
large. From the difference d of each resample, sacreBLEU takes abs(d) - mean(abs(d)) and counts how often that exceeds
the observed difference: only resamples that favour the better system can. Here abs(d - mean(d)) is counted, on both
sides. Paired randomisation is the test of `sacrebleu --paired-ar`.

With few examples the bootstrap finds too many differences: at 5 %, in 13 % of all tests with 6 examples and still in
5.4 % with 300. Below `SMALL` examples the interval is Student's, with the standard error of the jackknife (Tukey
1958), and the randomisation test decides. Where every example is right or wrong McNemar's test decides (Fagerland et
al. 2013 on its mid-p).

Where examples belong together, whole clusters are drawn, swapped and left out, and their number is what counts as few.
McNemar's test takes examples for independent, so with clusters the randomisation test decides instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.evaluation.closed_forms import mcnemar, smallest_p
from pipeline.evaluation.clusters import Clusters, single_examples
from pipeline.evaluation.power import student_interval
from pipeline.metrics import Metric
from pipeline.metrics.checks import check_examples
from pipeline.metrics.distinct import DistinctMetric
from pipeline.metrics.mean_metric import MeanMetric
from pipeline.metrics.resampling import bootstrap_indices, centre_resamples, percentile_interval, resampled_means
from pipeline.metrics.types import Rows
from pipeline.runtime.seeds import derive_seed

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
SMALL = 1000  # clusters (examples, if none belong together) below which percentiles of the bootstrap are too narrow
BOOTSTRAP, RANDOMISATION, MCNEMAR = "paired bootstrap", "paired randomisation", "McNemar"


@dataclass(frozen=True)
class Comparison:
    """System B against system A on the metric's corpus scale.

    `delta` is the score of B minus that of A over all examples; `low` and `high` are its 95 % interval, of percentiles
    from `SMALL` examples on. `p_value` is two-sided: how often a difference at least this large would turn up if the
    systems were equally good. `standard_error` is that of `delta`.
    """

    delta: float
    low: float
    high: float
    p_value: float
    standard_error: float


@dataclass(frozen=True)
class PairedTests:
    """All tests of system B against system A: the bootstrap's, the randomisation test's and the one that decides.

    `p_value` is that of `test`, which is one of BOOTSTRAP, RANDOMISATION and MCNEMAR.
    """

    bootstrap: Comparison
    p_randomisation: float
    p_value: float
    test: str


def compare_texts(
    metric: Metric,
    predictions_a: Sequence[str],
    predictions_b: Sequence[str],
    references: Sequence[Sequence[str]],
    n_resamples: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> PairedTests:
    """Test the predictions of two systems against each other by a metric; see `paired_bootstrap`."""
    texts, groups = (predictions_a, predictions_b, references), clusters or single_examples(len(references))
    bootstrap = paired_bootstrap(metric, *texts, n_resamples, seed, groups)
    randomised = paired_randomisation(metric, *texts, n_resamples, seed, groups)
    if isinstance(metric, DistinctMetric):  # resamples repeat texts, which lowers scores
        return PairedTests(bootstrap, randomised, randomised, RANDOMISATION)
    if not isinstance(metric, MeanMetric):  # no mean over examples, so that single examples do not decide
        return _choose_test(bootstrap, randomised, groups)
    scores = (metric.sample_scores(predictions, references) for predictions in (predictions_a, predictions_b))
    return _choose_test(bootstrap, randomised, groups, *scores)


def compare_values(
    values_a: Sequence[float],
    values_b: Sequence[float],
    n_resamples: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> PairedTests:
    """Test the means of two systems' numbers [N] for the same examples against each other."""
    groups = clusters or single_examples(len(values_a))
    bootstrap = paired_bootstrap_means(values_a, values_b, n_resamples, seed, groups)
    randomised = paired_randomisation_means(values_a, values_b, n_resamples, seed, groups)
    return _choose_test(bootstrap, randomised, groups, values_a, values_b)


def _choose_test(
    bootstrap: Comparison,
    p_randomisation: float,
    clusters: Clusters,
    values_a: Sequence[float] = (),
    values_b: Sequence[float] = (),
) -> PairedTests:
    """Choose the test that decides; the values, if any, are those whose means are compared."""
    binary = bool(values_a) and set(values_a) | set(values_b) <= {0.0, 1.0}
    if binary and clusters.single:
        return PairedTests(bootstrap, p_randomisation, mcnemar(values_a, values_b), MCNEMAR)
    if binary or clusters.count < SMALL:
        return PairedTests(bootstrap, p_randomisation, p_randomisation, RANDOMISATION)
    return PairedTests(bootstrap, p_randomisation, bootstrap.p_value, BOOTSTRAP)


def paired_bootstrap(
    metric: Metric,
    predictions_a: Sequence[str],
    predictions_b: Sequence[str],
    references: Sequence[Sequence[str]],
    n_resamples: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Comparison:
    """Compare the predictions (N texts each) of two systems against `references` (N lists of texts).

    Where `metric.higher_is_better` is false (TER), a negative delta means that B is better.

    Raises:
        ValueError: no examples, unequal lengths, fewer than one resample, or examples that the metric refuses.
    """
    groups = clusters or single_examples(len(references))
    indices = _resampled_rows(groups, n_resamples, seed)

    def differences(rows: Rows) -> np.ndarray:
        scores = [metric.resampled_scores(texts, references, rows) for texts in (predictions_a, predictions_b)]
        if not np.isfinite(scores).all():
            raise ValueError(
                f"metric {metric.name!r}: the score of some texts is no finite number; they are not compared"
            )
        return scores[1] - scores[0]

    scored = differences(indices)
    differing = _differing([a != b for a, b in zip(predictions_a, predictions_b, strict=True)], groups)
    return _compare(scored, groups, differences, differing, isinstance(metric, DistinctMetric))


def paired_bootstrap_means(
    values_a: Sequence[float],
    values_b: Sequence[float],
    n_resamples: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Comparison:
    """Compare the means of two systems' numbers [N] for the same examples, rewards for one.

    Raises:
        ValueError: no examples, unequal lengths, fewer than one resample, or a number that is not finite.
    """
    if len(values_a) != len(values_b):
        raise ValueError(f"the systems need values for the same examples, found {len(values_a)} and {len(values_b)}")
    groups = clusters or single_examples(len(values_a))
    indices = _resampled_rows(groups, n_resamples, seed)
    differences = np.asarray(values_b, dtype=np.float64) - np.asarray(values_a, dtype=np.float64)
    if not np.isfinite(differences).all():
        first = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise ValueError(f"the values of example {first} are not finite: {values_a[first]} and {values_b[first]}")
    resample = partial(resampled_means, differences)
    return _compare(resample(indices), groups, resample, _differing(differences != 0, groups))


def paired_randomisation(
    metric: Metric,
    predictions_a: Sequence[str],
    predictions_b: Sequence[str],
    references: Sequence[Sequence[str]],
    n_trials: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> float:
    """Compute the two-sided p of approximate randomisation: the systems swap their texts on a random half of the rows.

    With clusters, they swap those of a random half of the clusters.

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
    groups = clusters or single_examples(n)
    swaps = _swaps(groups.count, n_trials, seed)[:, groups.numbers]
    rows = np.vstack([rows_a, rows_b, np.where(swaps, rows_b, rows_a), np.where(swaps, rows_a, rows_b)])
    scores = metric.resampled_scores(pool, pool_references, rows)
    trials = scores[2 + n_trials :] - scores[2 : 2 + n_trials]
    return _randomised_p(scores[1] - scores[0], trials, len({groups.numbers[i] for i in differing}))


def paired_randomisation_means(
    values_a: Sequence[float],
    values_b: Sequence[float],
    n_trials: int = 1000,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> float:
    """Compute the p of `paired_randomisation` for the means of two systems' numbers [N] for the same examples."""
    differences = np.asarray(values_b, dtype=np.float64) - np.asarray(values_a, dtype=np.float64)
    groups = clusters or single_examples(len(differences))
    signs = np.where(_swaps(groups.count, n_trials, seed), -1.0, 1.0)
    sums = np.bincount(groups.numbers, differences)
    trials = (signs @ sums) / len(differences)
    return _randomised_p(float(differences.mean()), trials, _differing(differences != 0, groups))


def _swaps(n_clusters: int, n_trials: int, seed: int) -> np.ndarray:
    if n_trials < 1:
        raise ValueError(f"a randomisation test needs at least one trial, found {n_trials}")
    return np.random.default_rng(derive_seed(seed, "randomisation test")).random((n_trials, n_clusters)) < 0.5


def _randomised_p(delta: float, trials: np.ndarray, differing: int) -> float:
    # Sums of floats in another order: a tie must not be lost to rounding.
    extreme = np.abs(trials) >= abs(delta) - 1e-9
    return max((1 + int(extreme.sum())) / (len(trials) + 1), smallest_p(differing))


def _differing(are_different: Sequence[bool], clusters: Clusters) -> int:
    """Count the clusters with an example in which the systems differ."""
    return len({number for number, differs in zip(clusters.numbers, are_different, strict=True) if differs})


def _resampled_rows(clusters: Clusters, n_resamples: int, seed: int) -> Rows:
    if n_resamples < 1:
        raise ValueError(f"a paired bootstrap needs at least one resample, found {n_resamples}")
    return clusters.rows_with_full_set(bootstrap_indices(clusters.count, n_resamples, seed))


def _compare(
    differences: np.ndarray,
    clusters: Clusters,
    resample: Callable[[Rows], np.ndarray],
    differing: int,
    centre: bool = False,
) -> Comparison:
    """Summarise `differences` [R + 1], the first over all examples, the others over each resample.

    `resample` computes the differences over any rows of examples; the systems differ in `differing` clusters. With
    `centre` the interval lies around the first.
    """
    delta, resampled = float(differences[0]), differences[1:]
    # Around their own mean the resampled differences scatter as they would if the systems were equally good. The test
    # counts the observed difference as one of the scatter, so that p is never 0.
    extreme = np.abs(resampled - resampled.mean()) >= abs(delta)
    # A handful of differences scatters too little.
    p_value = max((1 + int(extreme.sum())) / (len(resampled) + 1), smallest_p(differing))
    if 1 < clusters.count < SMALL:
        error = _jackknife_error(clusters, resample)
        return Comparison(delta, *student_interval(delta, error, clusters.count - 1, CONFIDENCE), p_value, error)
    error = _above_rounding(resampled.std(ddof=1) if len(resampled) > 1 else 0.0, resampled)
    interval = percentile_interval(centre_resamples(resampled, delta) if centre else resampled, CONFIDENCE)
    return Comparison(delta, *interval, p_value, error)


def _jackknife_error(clusters: Clusters, resample: Callable[[Rows], np.ndarray]) -> float:
    """Compute the standard error from the differences without each cluster in turn."""
    without = resample(clusters.rows_without_each())
    return _above_rounding(np.sqrt((clusters.count - 1) * np.mean((without - without.mean()) ** 2)), without)


def _above_rounding(error: float, values: np.ndarray) -> float:
    """Return a standard error of values; 0 where they are the same and scatter by rounding alone."""
    return float(error) if error > 1e-12 * max(1.0, float(np.abs(values).max())) else 0.0
