"""Shares and their intervals: by hand, and how often an interval covers the truth where cases belong together."""

import numpy as np
import pytest

from pipeline.evaluation.proportions import share, wins


def test_wilsons_interval_by_hand():
    """60 of 100 cases: they are worth 99, because the variance is divided by 99; Student's t is that of 99 degrees."""
    found = share("x", [1.0] * 60 + [0.0] * 40, range(100))
    assert (found.value, found.count, found.clusters) == (0.6, 100, 100)
    assert (found.low, found.high) == pytest.approx(interval_of_worth(0.6, 99, 1.98422), abs=1e-5)
    assert (found.low, found.high) == pytest.approx((0.5003, 0.6921), abs=1e-4)


def interval_of_worth(p: float, n: float, t: float) -> tuple[float, float]:
    """Wilson's interval of n cases with the quantile t."""
    centre, spread = p + t**2 / (2 * n), t * (p * (1 - p) / n + t**2 / (4 * n**2)) ** 0.5
    return (centre - spread) / (1 + t**2 / n), (centre + spread) / (1 + t**2 / n)


def test_cases_that_agree_within_their_cluster_count_once():
    """Four clusters of five, three right and one wrong: the interval of four cases, less one for the variance."""
    clustered = share("x", [1.0] * 15 + [0.0] * 5, np.repeat(range(4), 5))
    assert (clustered.low, clustered.high) == pytest.approx(interval_of_worth(0.75, 3, 3.18245), abs=1e-5)
    assert clustered.count == 20 and clustered.clusters == 4
    even = share("x", [1.0, 1, 1, 0] * 5, np.repeat(range(5), 4))  # nothing scatters between clusters
    assert (even.low, even.high) == pytest.approx(interval_of_worth(0.75, 5, 2.77645), abs=1e-5)


def test_no_certainty_from_few_cases():
    right = share("x", [1.0] * 50, np.repeat(range(2), 25))
    assert right.value == right.high == 1.0 and right.low < 0.02
    one = share("x", [1.0] * 50, [7] * 50)
    assert (one.low, one.high, one.clusters) == (0.0, 1.0, 1)
    assert 0 < share("x", [0.5] * 4, range(4)).low < 0.5  # ties alone


def test_wins_by_hand():
    assert wins([(2.0, 1.0), (1.0, 1.0), (0.0, 1.0)]) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("prompts", "pairs", "correlation", "accuracy"),
    [(97, 25, 0.2, 0.6), (97, 25, 0.2, 0.8), (475, 2, 0.3, 0.8), (40, 5, 0.2, 0.7)],
)
def test_coverage_where_pairs_of_a_prompt_are_alike(prompts, pairs, correlation, accuracy):
    """Each prompt's chance is drawn from a beta distribution with this correlation within prompts, 1,000 times.

    The 95 % interval covers the truth 950 times, with a standard deviation of 7; that of independent pairs in 54 % of
    the first case.
    """
    rng, strength = np.random.default_rng(1), 1 / correlation - 1
    chances = rng.beta(accuracy * strength, (1 - accuracy) * strength, (1000, prompts))
    right = rng.random((1000, prompts, pairs)) < chances[..., None]
    labels = np.repeat(np.arange(prompts), pairs)
    intervals = [share("x", trial.ravel().astype(float), labels) for trial in right]
    covered = sum(interval.low <= accuracy <= interval.high for interval in intervals)
    print(covered)
    assert 928 <= covered <= 972
    if pairs == 25:
        single = [share("x", trial.ravel().astype(float), range(len(labels))) for trial in right[:200]]
        assert sum(interval.low <= accuracy <= interval.high for interval in single) < 140
