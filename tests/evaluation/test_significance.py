"""The paired bootstrap: by hand, against sacreBLEU, and in simulations whose truth is known."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from pipeline.evaluation.closed_forms import holm, mcnemar
from pipeline.evaluation.clusters import Clusters, clustered_score
from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.gains import paired_shares
from pipeline.evaluation.significance import (
    BOOTSTRAP,
    MCNEMAR,
    RANDOMISATION,
    Comparison,
    compare_texts,
    compare_values,
    paired_bootstrap,
    paired_bootstrap_means,
    paired_randomisation,
    paired_randomisation_means,
)
from pipeline.metrics import METRIC_NAMES, load_metric
from pipeline.metrics.mean_metric import MeanMetric
from pipeline.metrics.resampling import bootstrap_indices

WORDS = [f"w{i}" for i in range(50)]


def sentences(n: int, seed: int, length: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(n)]


def noisy(texts: list[str], rate: float, seed: int) -> list[str]:
    """Each word replaced with probability `rate`."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) if rng.random() < rate else word for word in text.split()) for text in texts]


def test_p_value_by_hand(monkeypatch):
    """B is better on examples 0 and 1, worse on 2; delta 1/3. The five resamples' means: three of 1/3, -1/3 and -1.

    Their mean is -1/15, so they lie 2/5 (three times), 4/15 and 14/15 from it: four at least 1/3, and
    p = (1 + 4) / (5 + 1).
    """
    rows = np.array([[0, 1, 2], [2, 0, 1], [0, 0, 2], [0, 2, 2], [2, 2, 2]])
    monkeypatch.setattr("pipeline.evaluation.significance.bootstrap_indices", lambda *_: rows)
    comparison = paired_bootstrap_means([0, 0, 1], [1, 1, 0], n_resamples=5)
    assert comparison.delta == pytest.approx(1 / 3)
    assert comparison.p_value == pytest.approx(5 / 6)
    # Three examples: Student's interval. Differences 1, 1, -1 have a standard deviation of (4/3)^(1/2).
    assert comparison.standard_error == pytest.approx(2 / 3)
    assert comparison.low == pytest.approx(1 / 3 - 4.30265 * 2 / 3)
    assert comparison.high == pytest.approx(1 / 3 + 4.30265 * 2 / 3)
    monkeypatch.setattr("pipeline.evaluation.significance.SMALL", 2)
    comparison = paired_bootstrap_means([0, 0, 1], [1, 1, 0], n_resamples=5)
    # The 2.5th percentile of -1, -1/3, 1/3, 1/3, 1/3 lies a tenth of the way from the first to the second.
    assert comparison.low == pytest.approx(-1 + 0.1 * 2 / 3)
    assert comparison.high == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_identical_predictions_give_no_difference(name):
    references = sentences(12, seed=1)
    predictions = noisy(references, 0.3, seed=2)
    comparison = paired_bootstrap(load_metric(name), predictions, predictions, [[r] for r in references], 50)
    assert comparison == Comparison(0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter", "rougeL", "token_f1", "wer", "cer"])
def test_real_improvement_is_found_in_the_right_direction(name):
    references = sentences(80, seed=3)
    worse, better = noisy(references, 0.4, seed=4), noisy(references, 0.2, seed=5)
    metric = load_metric(name)
    references = [[text] for text in references]
    forwards = paired_bootstrap(metric, worse, better, references, 300, seed=6)
    backwards = paired_bootstrap(metric, better, worse, references, 300, seed=6)
    assert forwards.p_value == backwards.p_value == 1 / 301
    assert (forwards.delta > 0) == metric.higher_is_better
    assert forwards.low < forwards.delta < forwards.high
    assert (forwards.low > 0) if metric.higher_is_better else (forwards.high < 0)
    assert (backwards.delta, backwards.low, backwards.high) == pytest.approx(
        (-forwards.delta, -forwards.high, -forwards.low)
    )


def test_variety_is_compared_around_the_difference_of_the_whole_sets(monkeypatch):
    """Resamples repeat texts, which lowers distinct-1 and the difference; the randomisation test repeats none."""
    few, many = sentences(60, seed=3, length=4), [f"{text} x{i}" for i, text in enumerate(sentences(60, 4, 3))]
    metric, references = load_metric("distinct1"), [["no matter"]] * 60
    monkeypatch.setattr("pipeline.evaluation.significance.SMALL", 2)
    tests = compare_texts(metric, few, many, references, 200, 1)
    delta = metric.corpus_score(many, references, 0).value - metric.corpus_score(few, references, 0).value
    assert tests.bootstrap.delta == pytest.approx(delta) and tests.bootstrap.low < delta < tests.bootstrap.high
    assert (tests.test, tests.p_value) == (RANDOMISATION, tests.p_randomisation) and tests.p_value < 0.01
    clustered = clustered_score(metric, few, references, Clusters(tuple(i // 2 for i in range(60))), 100, 0.95, 0)
    assert clustered.low < clustered.value < clustered.high


def test_delta_is_the_difference_of_the_corpus_scores():
    references = [[text, text[::-1]] for text in sentences(20, seed=7)]
    firsts = [texts[0] for texts in references]
    a, b = noisy(firsts, 0.5, seed=8), noisy(firsts, 0.4, seed=9)
    for name in METRIC_NAMES:
        metric = load_metric(name)
        value_a, value_b = (metric.corpus_score(texts, references, n_bootstrap=0).value for texts in (a, b))
        assert paired_bootstrap(metric, a, b, references, 10).delta == pytest.approx(value_b - value_a, abs=1e-12)


def test_result_is_determined_by_the_seed():
    references = sentences(120, seed=10)
    a, b = noisy(references, 0.3, seed=11), noisy(references, 0.3, seed=12)
    metric, references = load_metric("bleu"), [[text] for text in references]
    first, again, other = (paired_bootstrap(metric, a, b, references, 200, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.p_value != other.p_value
    assert first.delta == other.delta


def test_agreement_with_sacrebleu(monkeypatch):
    """sacreBLEU's randomisation test is two-sided, as ours is. Its bootstrap looks at one side: half our p.

    It counts |d| - mean|d| > |delta|, which only resamples that favour the better system can reach.
    """
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    references = sentences(150, seed=13)
    a, b = noisy(references, 0.30, seed=14), noisy(references, 0.28, seed=16)
    ours = paired_bootstrap(load_metric("bleu"), a, b, [[text] for text in references], 2000, seed=12345)

    def sacrebleu_p(test_type: str) -> float:
        test = PairedTest([("a", a), ("b", b)], {"BLEU": BLEU()}, [references], test_type, n_samples=2000)
        return test()[1]["BLEU"][1].p_value

    assert 0.1 < ours.p_value < 0.2  # far enough from 0 that half of it is another number
    assert ours.p_value == pytest.approx(sacrebleu_p("ar"), abs=0.03)
    assert ours.p_value / 2 == pytest.approx(sacrebleu_p("bs"), abs=0.02)


def test_both_systems_see_the_same_resamples():
    """B is A plus one, so the difference is the same in every resample: certain, though the values scatter widely."""
    values = np.random.default_rng(17).normal(scale=100, size=50)
    comparison = paired_bootstrap_means(values, values + 1, 200)
    assert (comparison.delta, comparison.low, comparison.high) == pytest.approx((1, 1, 1))
    assert comparison.p_value == 1 / 201


def test_p_is_not_below_that_of_a_coin_for_a_handful_of_examples():
    """Three examples that all favour B: three coins agree one time in four."""
    assert paired_bootstrap_means([0, 0, 0], [1, 2, 3]).p_value == 0.25
    assert paired_bootstrap_means([0.0], [5.0]).p_value == 1.0
    assert paired_bootstrap(load_metric("exact_match"), ["no"], ["yes"], [["yes"]]).p_value == 1.0


def test_texts_that_both_systems_write_carry_no_sign():
    """Five changes for the better among many equal texts: their signs agree with probability 2^-4."""
    n = 1200
    references = [[f"w{i} x{i} y{i} z{i} v{i}"] for i in range(n)]
    before = [texts[0] if i >= 5 else f"w{i} x{i} y{i} q u" for i, texts in enumerate(references)]
    after = [texts[0] for texts in references]
    tests = compare_texts(load_metric("bleu"), before, after, references, n_resamples=200)
    assert tests.bootstrap.p_value == tests.p_value == 1 / 16
    values = [0.25] * n
    changed = [value + (0.5 + i / 10 if i < 4 else 0) for i, value in enumerate(values)]
    tests = compare_values(values, changed, n_resamples=200)
    assert (tests.p_value, tests.p_randomisation) == (1 / 8, pytest.approx(1 / 8, abs=0.08))
    assert compare_values(values, values, n_resamples=200).p_value == 1


def test_one_example_does_not_scatter_by_rounding():
    tests = compare_texts(load_metric("bleu"), ["a b c d e"], ["a b c d f"], [["a b c d f g"]], n_resamples=100)
    assert tests.bootstrap.standard_error == 0 and tests.p_value == 1


def test_false_positive_rate_of_means():
    """Two equally good systems, 400 times: p < 0.05 about 20 times, with a standard deviation of 4.4."""
    rng = np.random.default_rng(18)
    difficulty = rng.normal(size=(400, 60))
    a, b = difficulty + rng.normal(size=(400, 60)), difficulty + rng.normal(size=(400, 60))
    p_values = np.array([paired_bootstrap_means(a[i], b[i], 200, seed=i).p_value for i in range(400)])
    assert 8 <= (p_values < 0.05).sum() <= 36
    assert 0.42 < p_values.mean() < 0.58


def test_false_positive_rate_of_bleu():
    """Two systems with the same noise, 100 times on 40 sentences: p < 0.05 about 5 times."""
    false_positives = 0
    for trial in range(100):
        references = sentences(40, seed=1000 + trial)
        a, b = noisy(references, 0.3, seed=2000 + trial), noisy(references, 0.3, seed=3000 + trial)
        comparison = paired_bootstrap(load_metric("bleu"), a, b, [[text] for text in references], 100, seed=trial)
        false_positives += comparison.p_value < 0.05
    assert 1 <= false_positives <= 13


def test_power_grows_with_the_examples():
    """A difference of half a standard deviation is found nearly always with 100 examples, seldom with 10."""
    rng = np.random.default_rng(19)

    def found(n_examples: int) -> int:
        differences = rng.normal(loc=0.5, size=(40, n_examples))
        p_values = [paired_bootstrap_means(np.zeros(n_examples), row, 200).p_value for row in differences]
        return sum(p < 0.05 for p in p_values)

    assert found(100) >= 38
    assert found(10) <= 30


def test_unusable_input_is_refused():
    metric = load_metric("exact_match")
    with pytest.raises(ValueError, match="no examples"):
        paired_bootstrap(metric, [], [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 lists"):
        paired_bootstrap(metric, ["a", "b"], ["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="at least one resample, found 0"):
        paired_bootstrap(metric, ["a"], ["a"], [["a"]], n_resamples=0)
    with pytest.raises(ValueError, match="no examples"):
        paired_bootstrap_means([], [])
    with pytest.raises(ValueError, match="found 1 and 2"):
        paired_bootstrap_means([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"values of example 1 are not finite: 2.0 and nan$"):
        paired_bootstrap_means([1.0, 2.0], [1.0, float("nan")])


def test_a_score_that_is_no_number_is_named():
    metric = MeanMetric("mine", "", lambda text, references: float("nan") if text == "c" else 1.0)
    with pytest.raises(ValueError, match=r"metric 'mine': the score of some texts is no finite number"):
        paired_bootstrap(metric, ["a", "b"], ["a", "c"], [["a"], ["b"]], n_resamples=10)


def test_indices_are_within_range_and_repeat():
    indices = bootstrap_indices(7, 100, seed=0)
    assert indices.shape == (100, 7)
    assert set(np.unique(indices)) == set(range(7))
    assert any(len(set(row)) < 7 for row in indices.tolist())


def test_randomisation_by_hand(monkeypatch):
    """Differences 2, 1, -1 with mean 2/3. Swapped: 2/3, -2/3, 0 and 4/3, three of which count."""
    swaps = np.array([[False, False, False], [True, True, True], [True, False, True], [False, False, True]])
    monkeypatch.setattr("pipeline.evaluation.significance._swaps", lambda *_: swaps)
    assert paired_randomisation_means([0, 0, 1], [2, 1, 0], 4) == pytest.approx(4 / 5)


def test_randomisation_agrees_with_sacrebleu(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    references = sentences(120, seed=13)
    a, b = noisy(references, 0.30, seed=14), noisy(references, 0.28, seed=16)
    ours = paired_randomisation(load_metric("bleu"), a, b, [[text] for text in references], 2000, seed=1)
    test = PairedTest([("a", a), ("b", b)], {"BLEU": BLEU()}, [references], "ar", n_samples=2000)
    assert ours == pytest.approx(test()[1]["BLEU"][1].p_value, abs=0.04)
    assert 0.02 < ours < 0.98


def test_randomisation_of_the_same_texts_and_of_better_ones():
    references = sentences(30, seed=3)
    metric, texts = load_metric("bleu"), noisy(references, 0.3, seed=4)
    lists = [[text] for text in references]
    assert paired_randomisation(metric, texts, texts, lists, 100) == 1.0
    assert paired_randomisation(metric, texts, references, lists, 100) == 1 / 101
    assert paired_randomisation_means([0.0], [5.0]) == 1.0  # one example decides nothing
    with pytest.raises(ValueError, match="1 predictions for 2 lists"):
        paired_randomisation(metric, ["a"], ["a", "b"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="at least one trial, found 0"):
        paired_randomisation_means([0.0], [1.0], 0)


def test_a_against_a_is_significant_one_time_in_twenty():
    """Two samples of one system, 200 times: p < 0.05 about 10 times (standard deviation 3.1), and 95 % intervals
    hold the true difference, 0, about 190 times."""
    rng = np.random.default_rng(23)
    low_p, low_randomised, covered = 0, 0, 0
    for trial in range(200):
        difficulty = rng.normal(size=80)
        a, b = difficulty + rng.normal(size=80), difficulty + rng.normal(size=80)
        comparison = paired_bootstrap_means(a, b, 300, seed=trial)
        low_p += comparison.p_value < 0.05
        covered += comparison.low <= 0 <= comparison.high
        low_randomised += paired_randomisation_means(a, b, 300, seed=trial) < 0.05
    assert 2 <= low_p <= 20 and 2 <= low_randomised <= 20
    assert 180 <= covered <= 198


def test_shares_by_hand():
    shares = paired_shares([0, 0, 0, 0], [1, 3, 0, -2])
    assert (shares.wins, shares.losses, shares.better) == (0.5, 0.25, 0.625)  # two wins and half a tie of four
    # The same text in two batches: the learned reward differs by a few float32 roundings.
    shares = paired_shares([0.7, -40.0, 0.7, 0.7], [0.7000004, -40.00002, 0.7002, 0.6998])
    assert (shares.wins, shares.losses) == (0.25, 0.25)


def test_mcnemar_by_hand():
    """B is right where A is wrong five times, the reverse once: mid-p is 2 x (1 + 6/2) / 64."""
    wrong, right = [0.0] * 5 + [1.0], [1.0] * 5 + [0.0]
    assert mcnemar(wrong, right) == mcnemar(right, wrong) == pytest.approx(0.125)
    assert mcnemar([0.0] * 4, [1.0] * 4) == pytest.approx(1 / 16)
    assert mcnemar([0.0, 1.0], [1.0, 0.0]) == pytest.approx(0.75)  # one each: 1 - 1/2 x 1/2
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0


def test_which_test_decides():
    rng = np.random.default_rng(24)
    few, many = rng.normal(size=(2, 999)).tolist(), rng.normal(size=(2, 1000)).tolist()
    binary = rng.integers(0, 2, (2, 40)).astype(float).tolist()
    small, large, right = (compare_values(*values) for values in (few, many, binary))
    assert (small.test, large.test, right.test) == (RANDOMISATION, BOOTSTRAP, MCNEMAR)
    assert small.p_value == small.p_randomisation and large.p_value == large.bootstrap.p_value
    assert right.p_value == mcnemar(*binary)
    answers = ["yes", "no"] * 20
    exact = compare_texts(load_metric("exact_match"), answers, ["yes"] * 40, [["yes"]] * 40)
    assert exact.test == MCNEMAR and exact.p_value == pytest.approx(2.0**-20)
    assert compare_texts(load_metric("bleu"), answers, ["yes"] * 40, [["yes"]] * 40).test == RANDOMISATION


@pytest.mark.parametrize("n_examples", [6, 10, 20, 50])
def test_small_sets_keep_their_level(n_examples):
    """Equally good systems 500 times: at most 5 % false differences and intervals that cover 0 in 95 %.

    With a standard deviation of 1 %; percentiles of the bootstrap cover 87 % at 6 examples, and its p errs in 13 %.
    """
    differences = np.random.default_rng(n_examples).normal(size=(500, n_examples))
    tests = [
        compare_values(np.zeros(n_examples).tolist(), row.tolist(), 1000, seed) for seed, row in enumerate(differences)
    ]
    assert sum(test.p_value < 0.05 for test in tests) <= 500 * 0.075
    assert sum(test.bootstrap.low <= 0 <= test.bootstrap.high for test in tests) >= 500 * 0.93


def test_the_standard_error_of_many_and_of_few():
    rng = np.random.default_rng(25)
    few, many = rng.normal(size=60), rng.normal(size=1200)
    assert paired_bootstrap_means(np.zeros(60), few).standard_error == pytest.approx(few.std(ddof=1) / 60**0.5)
    error = paired_bootstrap_means(np.zeros(1200), many).standard_error
    assert error == pytest.approx(many.std(ddof=1) / 1200**0.5, rel=0.07)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, and no less
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_scores_are_those_of_the_sacrebleu_command_line(tmp_path):
    """To the last digit it prints, and with its signature."""
    references = sentences(40, seed=30)
    predictions = noisy(references, 0.3, seed=31)
    (tmp_path / "ref.txt").write_text("\n".join(references) + "\n")
    (tmp_path / "sys.txt").write_text("\n".join(predictions) + "\n")
    for name in ("bleu", "chrf", "ter"):
        command = [sys.executable, "-m", "sacrebleu", "ref.txt", "-i", "sys.txt", "-m", name, "-w", "12"]
        output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        found = json.loads(output)
        score = load_metric(name).corpus_score(predictions, [[text] for text in references], n_bootstrap=0)
        assert f"{score.value:.12f}" == f"{found['score']:.12f}"
        assert sorted(score.signature.split("|")) == sorted(found["signature"].split("|"))


def test_no_resample_is_refused():
    with pytest.raises(ValueError, match=r"eval\.n_bootstrap: must be at least 1, found 0"):
        EvalConfig(n_bootstrap=0)
