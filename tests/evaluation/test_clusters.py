"""Clusters of examples: by hand, against the same data without copies, and in simulations whose truth is known."""

from datetime import datetime
from decimal import Decimal

import numpy as np
import pytest
from evaluation_toys import BAD, BLEU, GOOD, MIXED, REFERENCES, TER, make_report

from pipeline.evaluation.clusters import Clusters, cluster_by, clustered_score, single_examples, sizes_text
from pipeline.evaluation.significance import (
    BOOTSTRAP,
    MCNEMAR,
    RANDOMISATION,
    compare_texts,
    compare_values,
    paired_bootstrap,
    paired_randomisation,
)
from pipeline.metrics import METRIC_NAMES, load_metric
from pipeline.metrics.resampling import bootstrap_indices


def test_labels_become_numbers_in_order():
    assert cluster_by(["b", "a", "b", ["a"], None]).numbers == (0, 1, 0, 2, 3)
    days = [datetime(2026, 1, day) for day in (2, 1, 2)]
    assert cluster_by(days).numbers == (0, 1, 0) and cluster_by([Decimal("1.5"), Decimal("1.5")]).numbers == (0, 0)
    assert cluster_by(["x", "y"]).single and not cluster_by(["x", "x"]).single
    assert cluster_by([]).count == 0 and single_examples(3).numbers == (0, 1, 2)
    assert sizes_text(1190, 240) == "1,190 examples in 240 clusters" and sizes_text(5, 5) == "5 examples"


def test_rows_by_hand():
    clusters = Clusters((0, 1, 0, 2))
    rows = clusters.rows(np.array([[0, 1, 2], [0, 0, 1], [1, 2, 2]]))
    assert [row.tolist() for row in rows] == [[0, 2, 1, 3], [0, 2, 0, 2, 1], [1, 3, 3]]
    assert [row.tolist() for row in clusters.rows_without_each()] == [[1, 3], [0, 2, 3], [0, 1, 2]]
    first, *_ = clusters.rows_with_full_set(np.array([[0, 0, 1]]))
    assert first.tolist() == [0, 1, 2, 3]
    even = Clusters((0, 1, 1, 0)).rows(np.array([[1, 1], [0, 1]]))
    assert isinstance(even, np.ndarray) and even.tolist() == [[1, 2, 1, 2], [0, 3, 1, 2]]
    drawn = bootstrap_indices(5, 7, 0)
    assert single_examples(5).rows(drawn) is drawn


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_a_resample_of_clusters_is_the_score_of_its_examples(name, corpus_of_eight):
    metric, rows = load_metric(name), Clusters((0, 1, 1, 2, 2, 2, 0, 0)).rows(np.array([[0, 0, 1], [2, 1, 1]]))
    for row, resampled in zip(rows, metric.resampled_scores(*corpus_of_eight, rows), strict=True):
        texts = [[column[i] for i in row] for column in corpus_of_eight]
        assert resampled == pytest.approx(metric.corpus_score(*texts, n_bootstrap=0).value, rel=1e-12)


@pytest.fixture
def corpus_of_eight():
    return [*BAD[:3], *GOOD[3:6], *MIXED[6:8]], REFERENCES[:8]


@pytest.mark.parametrize("metric", [BLEU, TER, load_metric("rougeL")], ids=["bleu", "ter", "rougeL"])
@pytest.mark.parametrize("small", [2, 1000])
def test_copies_of_an_example_add_nothing(metric, small, monkeypatch):
    """Every example three times is one cluster of three: all figures are those of the examples without copies."""
    monkeypatch.setattr("pipeline.evaluation.significance.SMALL", small)
    once = compare_texts(metric, MIXED, GOOD, REFERENCES, 300, 1)
    clusters = cluster_by(list(range(12)) * 3)
    thrice = compare_texts(metric, MIXED * 3, GOOD * 3, REFERENCES * 3, 300, 1, clusters)
    assert vars(thrice.bootstrap) == pytest.approx(vars(once.bootstrap), abs=1e-9)
    assert thrice.p_randomisation == once.p_randomisation
    copied = compare_texts(metric, MIXED * 3, GOOD * 3, REFERENCES * 3, 300, 1)
    assert copied.bootstrap.standard_error < 0.7 * once.bootstrap.standard_error
    values = [metric.sample_scores(texts, REFERENCES) for texts in (MIXED, GOOD)]
    once = compare_values(*values, 300, 1)
    thrice = compare_values(values[0] * 3, values[1] * 3, 300, 1, clusters)
    assert vars(thrice.bootstrap) == pytest.approx(vars(once.bootstrap), abs=1e-9)
    assert thrice.p_randomisation == once.p_randomisation


def test_the_standard_error_of_unequal_clusters_by_hand():
    """Differences 3, 1 | 2 | 0, 0, 6: means without each cluster 2, 2 and 2, then with another number."""
    error = compare_values([0.0] * 6, [3.0, 1, 2, 0, 0, 6], clusters=Clusters((0, 0, 1, 2, 2, 2))).bootstrap
    assert (error.delta, error.standard_error) == (2.0, 0.0)
    error = compare_values([0.0] * 4, [3.0, 1, 2, 0], clusters=Clusters((0, 0, 1, 2))).bootstrap
    # Without each: 1, 4/3, 2. Their mean is 13/9; squares 16/81, 1/81, 25/81; (2 * 14/81) ** 0.5.
    assert error.standard_error == pytest.approx((28 / 81) ** 0.5)


def test_all_examples_of_a_cluster_swap_together(monkeypatch):
    swaps = np.array([[False, True], [True, True], [False, False], [True, False]])
    monkeypatch.setattr("pipeline.evaluation.significance._swaps", lambda *_: swaps)
    clusters = Clusters((0, 0, 1))
    # Differences 1, 1 | -1 with mean 1/3; swapped 1, -1/3, 1/3 and -1, all at least as large, so p = 1.
    assert compare_values([0.0, 0, 1], [1.0, 1, 0], 4, clusters=clusters).p_randomisation == 1.0
    # Differences 2, 1 | -1: mean 2/3; swapped 4/3, -2/3, 2/3, -4/3.
    scores = [["yes", "yes", "no"], ["no", "no", "yes"], [["yes"]] * 3]
    assert paired_randomisation(load_metric("exact_match"), *scores, 4, clusters=clusters) == 1.0


def test_which_test_decides_with_clusters():
    """McNemar's test takes right and wrong answers for independent, so with clusters the swaps decide."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, (2, 4000)).astype(float).tolist()
    numbers = rng.normal(size=(2, 4000)).tolist()
    many, few = cluster_by([n // 2 for n in range(4000)]), cluster_by([n // 8 for n in range(4000)])
    assert compare_values(*answers, 100).test == MCNEMAR
    assert compare_values(*answers, 100, clusters=single_examples(4000)).test == MCNEMAR
    assert compare_values(*answers, 100, clusters=many).test == RANDOMISATION
    assert compare_values(*numbers, 100, clusters=many).test == BOOTSTRAP
    assert compare_values(*numbers, 100, clusters=few).test == RANDOMISATION  # 500 clusters
    assert paired_bootstrap(BLEU, BAD, GOOD, REFERENCES, 100, clusters=cluster_by([0] * 12)).p_value == 1.0


@pytest.mark.parametrize("binary", [False, True])
def test_equally_good_systems_with_clusters(binary):
    """30 paragraphs of 2 to 8 questions that are alike, 200 times: at most 5 % false differences, and intervals that
    cover 0 in 95 %, with a standard deviation of 1.5 %. Single questions give 20 % and more."""
    rng = np.random.default_rng(3)
    ours, singles, covered = 0, 0, 0
    for seed in range(200):
        labels = np.repeat(np.arange(30), rng.integers(2, 9, 30))
        shared = rng.normal(size=30)[labels]
        values = shared + rng.normal(size=len(labels))
        a, b = (values < -1, values > 1) if binary else (np.zeros(len(labels)), values)
        a, b = a.astype(float).tolist(), b.astype(float).tolist()
        test = compare_values(a, b, 1000, seed, cluster_by(labels.tolist()))
        ours += test.p_value < 0.05
        covered += test.bootstrap.low <= 0 <= test.bootstrap.high
        singles += compare_values(a, b, 1000, seed).p_value < 0.05
    assert ours <= 200 * 0.09 and covered >= 200 * 0.905
    assert singles >= 200 * 0.12


def test_scores_have_intervals_of_clusters():
    numbers = [*range(12)] * 3
    texts, references = MIXED * 3, REFERENCES * 3
    score = clustered_score(BLEU, texts, references, cluster_by(numbers), 200, 0.9, 5)
    once = BLEU.corpus_score(MIXED, REFERENCES, 200, 0.9, 5)
    assert (score.value, score.low, score.high) == pytest.approx((once.value, once.low, once.high))
    assert score.signature == f"bs:200|seed:5|clusters:12|nrefs:1|{BLEU.signature}"


def test_the_report_says_examples_and_clusters(tmp_path):
    report, _ = make_report({"sft": MIXED, "ppo": GOOD}, clusters=cluster_by([n // 3 for n in range(12)]))
    first = report.comparisons[0]
    assert (first.examples, first.clusters, first.test) == (12, 4, RANDOMISATION)
    assert "12 examples in 4 clusters see a difference" in report.findings[0]
    assert "clusters:4" in report.systems["ppo"].metrics["bleu"].signature
    assert first.smallest_difference == pytest.approx((3.18245 + 0.97847) * first.standard_error, rel=1e-4)  # t, 3 df
    assert first.p_value >= 2.0**-3
    plain, _ = make_report({"sft": MIXED, "ppo": GOOD})
    assert plain.comparisons[0].clusters == 12 and "12 examples see" in plain.findings[0]
