"""Relay's randomisation test against p-values that others have published for the systems of WMT17."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from type_one_error import LEVELS, METRICS, equal_answers, equal_translations, main
from wmt17 import CountedBleu, corpus_bleu, load_p_values, load_statistics, resampled_counts

from pipeline.evaluation.significance import paired_randomisation

P_VALUES = load_p_values()
STATISTICS = load_statistics()
FLOOR = 0.001  # below it, a thousand trials are enough to agree


def test_the_counts_are_those_of_the_systems():
    assert len(STATISTICS) == 16 and set(P_VALUES["multeval"]) == set(STATISTICS) - {P_VALUES["baseline"]}
    assert {counts.shape for counts in STATISTICS.values()} == {(3004, 10)}
    totals = np.array([counts.sum(axis=0) for counts in STATISTICS.values()])
    bleu = BLEU(tokenize="none", force=True)
    expected = [bleu._compute_score_from_stats(row).score for row in totals.tolist()]
    assert corpus_bleu(totals) == pytest.approx(expected, abs=1e-9)
    assert dict(zip(STATISTICS, expected, strict=True))[P_VALUES["baseline"]] == pytest.approx(21.610, abs=1e-3)


@pytest.mark.parametrize("system", P_VALUES["multeval"])
def test_the_p_values_of_multeval(system):
    """MultEval's randomisation test of BLEU with 10,000 trials, and ours with as many where p is not at its floor."""
    published = P_VALUES["multeval"][system]
    baseline = STATISTICS[P_VALUES["baseline"]]
    metric = CountedBleu(np.vstack([baseline, STATISTICS[system]]))
    rows, size = [str(row) for row in range(len(metric.counts))], len(baseline)
    trials = 10_000 if published > FLOOR else 1000
    p_value = paired_randomisation(metric, rows[:size], rows[size:], [[""]] * size, trials, seed=0)
    print(system, p_value, published)
    assert p_value == pytest.approx(published, abs=0.011)


def test_resampled_counts_by_hand():
    counts = np.array([[1, 10], [2, 20], [4, 40]])
    sums = resampled_counts(counts, np.array([[0, 1, 2], [2, 2, 2], [0, 0, 1]]))
    assert sums.tolist() == [[7, 70], [12, 120], [4, 40]]


def test_the_simulated_systems_are_equally_good():
    """Over many draws neither system is ahead: the mean difference is within four standard errors of 0."""
    systems, rng = list(STATISTICS.values()), np.random.default_rng(0)
    pairs = [equal_translations(systems, 200, rng) for _ in range(200)]
    bleu = np.array([corpus_bleu(np.array([a.sum(axis=0), b.sum(axis=0)])) for a, b in pairs])
    answers = np.array([[a[:, 0].mean(), b[:, 0].mean()] for a, b in (equal_answers(200, rng) for _ in range(200))])
    for scores in (bleu, answers):
        differences = scores[:, 1] - scores[:, 0]
        assert differences.std() > 0 and abs(differences.mean()) < 4 * differences.std() / len(differences) ** 0.5


def test_false_differences_in_a_few_trials(capsys):
    """In 60 trials at 5 % about 3 (standard deviation 1.7); sacreBLEU's own function agrees in the first trials."""
    cells = main(["--trials", "60", "--sizes", "50", "120"])
    assert [(c.metric, c.examples) for c in cells] == [(m, size) for m in METRICS for size in (50, 120)]
    assert all(cell.relay[LEVELS[0]] <= 9 / 60 for cell in cells)
    assert np.mean([c.sacrebleu[LEVELS[0]] - c.relay[LEVELS[0]] for c in cells]) > 0
    assert "| BLEU | 120 | paired randomisation |" in capsys.readouterr().out
