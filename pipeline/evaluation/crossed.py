"""A test of a mean difference over seeds and examples: how sure it is with other seeds on other examples.

Source: Owen, The pigeonhole bootstrap (2007). Every seed is scored on the same resamples of the examples, and seeds
are drawn as well. The draw of seeds is computed instead of simulated, with the variance that is right for few seeds.
The variance that seeds and examples share is counted once, where the plain bootstrap counts it three times. The
degrees of freedom are Satterthwaite's (1946), so that three seeds are trusted as three.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.evaluation.power import student_interval, student_p
from pipeline.evaluation.significance import CONFIDENCE


@dataclass(frozen=True)
class CrossedComparison:
    """A mean over seeds, its 95 % interval and two-sided p, its standard error and the error's degrees of freedom."""

    delta: float
    low: float
    high: float
    p_value: float
    standard_error: float
    degrees: float


def crossed_comparison(b: np.ndarray, n_clusters: int, a: np.ndarray | None = None) -> CrossedComparison:
    """Test whether the mean of `b` over the seeds is 0, or differs from that of `a`, whose seeds are others.

    `b` and `a` are [S, R + 1]: a row for each seed, the first column over all examples, the others over the same R
    resamples of their clusters, which are the examples themselves where none belong together.
    """
    groups = [b] if a is None else [b, a]
    means = b.mean(axis=0) - (0.0 if a is None else a.mean(axis=0))
    delta, resampled = float(means[0]), means[1:]
    # A bootstrap of N clusters scatters by (N - 1) / N too little.
    from_examples = float(resampled.var(ddof=1)) * n_clusters / max(n_clusters - 1, 1)
    from_seeds = [float(group[:, 0].var(ddof=1)) / len(group) for group in groups]
    shared = [float((group[:, 1:] - group[:, :1]).var(axis=0, ddof=1).mean()) / len(group) for group in groups]
    of_seeds_alone = sum(max(seeds - both, 0.0) for seeds, both in zip(from_seeds, shared, strict=True))
    variance = from_examples + of_seeds_alone
    squares = sum(seeds**2 / (len(group) - 1) for seeds, group in zip(from_seeds, groups, strict=True))
    squares += max(from_examples - sum(shared), 0.0) ** 2 / max(n_clusters - 1, 1)
    degrees = min(variance**2 / squares, n_clusters - 1) if squares > 0 else max(n_clusters - 1, 1)
    comparison = _student_comparison(delta, variance**0.5, max(degrees, 1.0))
    # A handful of clusters decides nothing, however many seeds agree on it: see `significance`.
    return replace(comparison, p_value=max(comparison.p_value, 2.0 ** (1 - n_clusters)))


def seeds_alone(deltas: Sequence[float]) -> CrossedComparison:
    """Test whether the mean of the seeds' differences is 0 by Student's t over them, blind to the examples."""
    values = np.asarray(deltas, dtype=np.float64)
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return _student_comparison(float(values.mean()), error, len(values) - 1)


def _student_comparison(delta: float, error: float, degrees: float) -> CrossedComparison:
    interval = student_interval(delta, error, degrees, CONFIDENCE)
    return CrossedComparison(delta, *interval, student_p(delta, error, degrees), error, degrees)
