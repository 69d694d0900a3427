"""Tests over seeds and examples, and of many runs at once, in simulations whose truth is known."""

import numpy as np
import pytest

from pipeline.evaluation.closed_forms import holm
from pipeline.evaluation.crossed import crossed_comparison, seeds_alone
from pipeline.evaluation.power import equivalence_margin, p_cell, p_text, size_text, smallest_difference
from pipeline.evaluation.significance import paired_bootstrap_means
from pipeline.metrics.resampling import bootstrap_indices, with_full_set

EXAMPLES = 200


def counts(n_examples: int = EXAMPLES, n_resamples: int = 400) -> np.ndarray:
    """How often each resample holds each example, as shares: means over resamples are one product."""
    indices = with_full_set(bootstrap_indices(n_examples, n_resamples, 0))
    return np.array([np.bincount(row, minlength=n_examples) for row in indices]) / n_examples


def differences(rng, seeds: int, of_seeds: float, of_examples: float, of_both: float) -> np.ndarray:
    """Sentence by sentence [seeds, EXAMPLES], with these standard deviations and a mean of 0."""
    return (
        rng.normal(0, of_seeds, (seeds, 1))
        + rng.normal(0, of_examples, (1, EXAMPLES))
        + rng.normal(0, of_both, (seeds, EXAMPLES))
    )


@pytest.mark.parametrize(
    ("of_seeds", "of_examples", "of_both"), [(0, 1, 0.3), (0, 0.3, 1), (0.1, 1, 0.3), (0.1, 0.3, 1), (1, 0.1, 0.1)]
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_no_effect_is_found_one_time_in_twenty(seeds, of_seeds, of_examples, of_both):
    """At most 8.5 % of 400 (standard deviation 1.1 %), whatever scatters; t over seeds errs in half of the first."""
    rng, shares = np.random.default_rng(1), counts()
    values = [differences(rng, seeds, of_seeds, of_examples, of_both) @ shares.T for _ in range(400)]
    tested = [crossed_comparison(value, EXAMPLES) for value in values]
    assert sum(test.p_value < 0.05 for test in tested) <= 34
    assert sum(test.low <= 0 <= test.high for test in tested) >= 366


def test_two_groups_of_seeds_without_an_effect():
    rng, shares = np.random.default_rng(2), counts()
    p_values = []
    for _ in range(300):
        examples = rng.normal(0, 1, (1, EXAMPLES))
        a, b = ((examples + differences(rng, 3, 0.1, 0, 0.5)) @ shares.T for _ in range(2))
        p_values.append(crossed_comparison(b, EXAMPLES, a).p_value)
    assert sum(p < 0.05 for p in p_values) <= 26


def test_a_mean_gain_of_three_seeds_is_found():
    """+0.95, +1.00 and +0.57 where the examples alone leave a standard error of about 0.25."""
    rng, shares = np.random.default_rng(3), counts()
    noise = differences(rng, 3, 0, 1.5, 3)
    noise += np.array([[0.95], [1.0], [0.57]]) - noise.mean(axis=1, keepdims=True)
    tested = crossed_comparison(noise @ shares.T, EXAMPLES)
    assert tested.delta == pytest.approx(0.84) and tested.low > 0 and tested.p_value < 0.01
    alone = seeds_alone([0.95, 1.0, 0.57])
    assert (alone.delta, alone.p_value) == pytest.approx((0.84, 0.0252), abs=1e-4)
    assert (alone.low, alone.high) == pytest.approx((0.84 - 4.30265 * alone.standard_error, 1.4238), abs=1e-3)


def test_the_error_of_crossed_means_by_the_analysis_of_variance():
    rng, shares = np.random.default_rng(4), counts(n_resamples=4000)
    values = differences(rng, 4, 0.1, 0.1, 1)  # most of it is shared by seeds and examples
    seeds = values.mean(axis=1).var(ddof=1) / 4
    examples = values.mean(axis=0).var(ddof=1) / EXAMPLES
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    both = (residual**2).sum() / 3 / (EXAMPLES - 1) / EXAMPLES / 4
    tested = crossed_comparison(values @ shares.T, EXAMPLES)
    assert tested.standard_error == pytest.approx((seeds + examples - both) ** 0.5, rel=0.05)


def test_one_example_decides_nothing():
    assert crossed_comparison(np.full((3, 11), 1.0) + np.arange(3)[:, None] / 100, 1).p_value == 1.0


def test_ten_equal_runs_differ_in_one_page_of_twenty():
    """Nine runs against the first on shared examples: without a correction a third of the pages name a difference."""
    rng, pages, named, uncorrected = np.random.default_rng(5), 200, 0, 0
    for page in range(pages):
        runs = rng.normal(size=(10, 120))
        p_values = [paired_bootstrap_means(runs[0], other, 1000, page).p_value for other in runs[1:]]
        uncorrected += min(p_values) < 0.05
        named += min(holm(p_values)) < 0.05
    assert named <= 0.05 * pages + 6 and uncorrected > 0.25 * pages


def test_power_by_hand():
    assert smallest_difference(0.31) == pytest.approx(0.8685, abs=1e-4)  # (1.9600 + 0.8416) x 0.31
    assert smallest_difference(1.0, 5) == pytest.approx(2.5706 + 0.9195, abs=1e-3)
    assert equivalence_margin(-0.2, 0.1) == pytest.approx(0.36449, abs=1e-5)  # 0.2 + 1.6449 x 0.1


def test_the_smallest_difference_is_found_four_times_in_five():
    rng, n = np.random.default_rng(6), 150
    true = smallest_difference(1 / n**0.5)
    tests = [paired_bootstrap_means(np.zeros(n), rng.normal(true, 1, n), 1000, seed) for seed in range(300)]
    assert 0.74 <= np.mean([test.p_value < 0.05 for test in tests]) <= 0.86


def test_p_in_words():
    assert (p_text(0.0123), p_text(1 / 1001), p_cell(0.5), p_cell(0.0)) == (
        "p = 0.012",
        "p < 0.001",
        "0.500",
        "< 0.001",
    )
    assert (size_text(0.8685), size_text(0.00312), size_text(0.0)) == ("0.87", "0.0031", "0.00")
