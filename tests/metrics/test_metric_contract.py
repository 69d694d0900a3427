"""What holds for every built-in metric."""

import numpy as np
import pytest

from pipeline.metrics import METRIC_NAMES, Metric, Score, load_metric

LOWER_IS_BETTER = ("ter", "wer", "cer")
AGREE_ON_NOTHING = (*LOWER_IS_BETTER, "exact_match", "token_f1", "squad_em", "squad_f1")
WITHOUT_REFERENCES = ("distinct1", "distinct2")
every_metric = pytest.mark.parametrize("name", METRIC_NAMES)
every_metric_of_references = pytest.mark.parametrize(
    "name", [name for name in METRIC_NAMES if name not in WITHOUT_REFERENCES]
)


@every_metric
def test_metric_has_the_protocol_and_its_name(name):
    metric = load_metric(name)
    assert isinstance(metric, Metric)
    assert metric.name == name
    assert metric.signature
    assert metric.higher_is_better == (name not in LOWER_IS_BETTER)


@every_metric_of_references
def test_sample_scores_are_fractions_in_order_of_quality(name):
    reference = "the old house stands on the green hill"
    predictions = [reference, "the old house stands on a hill", "no"]
    best, middle, worst = load_metric(name).sample_scores(predictions, [[reference]] * 3)
    assert best == pytest.approx(1.0, abs=1e-12)
    assert best <= 1.0
    assert worst < 0.2
    assert worst <= middle < best


@every_metric_of_references
def test_perfect_corpus_is_100_except_for_the_error_rate(name):
    texts = ["the old house stands on the green hill", "Größe und Übermaß sind zwei Dinge"]
    score = load_metric(name).corpus_score(texts, [[text] for text in texts], n_bootstrap=20)
    perfect = 0.0 if name in LOWER_IS_BETTER else 100.0
    assert (score.value, score.low, score.high) == pytest.approx((perfect,) * 3)


@every_metric
def test_resampling_every_example_once_is_the_corpus_score(name, corpus):
    metric = load_metric(name)
    identity = np.arange(8)[None]
    assert metric.resampled_scores(*corpus, identity).tolist() == [metric.corpus_score(*corpus, n_bootstrap=0).value]


@every_metric
def test_a_resample_is_the_score_of_the_examples_it_names(name, corpus):
    metric = load_metric(name)
    rows = np.array([[0, 0, 1, 5, 7, 7, 7, 4], [4, 4, 4, 4, 4, 4, 4, 4]])
    for row, resampled in zip(rows, metric.resampled_scores(*corpus, rows), strict=True):
        texts = [[column[i] for i in row] for column in corpus]
        assert resampled == pytest.approx(metric.corpus_score(*texts, n_bootstrap=0).value, rel=1e-12)


@every_metric
def test_interval_contains_the_score_and_widens_with_confidence(name, corpus):
    metric = load_metric(name)
    score = metric.corpus_score(*corpus, n_bootstrap=300)
    assert isinstance(score, Score)
    assert score.low < score.value < score.high
    narrow = metric.corpus_score(*corpus, n_bootstrap=300, confidence=0.5)
    assert score.low <= narrow.low < narrow.high < score.high


@every_metric
def test_interval_is_determined_by_the_seed(name, corpus):
    metric = load_metric(name)
    first, again, other = (metric.corpus_score(*corpus, n_bootstrap=50, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value


@every_metric
def test_signature_says_references_and_bootstrap(name, corpus):
    metric = load_metric(name)
    assert metric.corpus_score(*corpus, n_bootstrap=9, seed=5).signature == f"nrefs:var|bs:9|seed:5|{metric.signature}"
    assert metric.corpus_score(["a"], [["b", "c"]], n_bootstrap=0).signature == f"nrefs:2|{metric.signature}"


@every_metric
@pytest.mark.parametrize("empty", ["", "  \n\t"])
def test_empty_predictions_score_nothing(name, empty):
    metric = load_metric(name)
    assert metric.sample_scores([empty] * 2, [["some words"], ["two", "references"]]) == [0.0, 0.0]
    score = metric.corpus_score([empty] * 2, [["some words"], ["two", "references"]], n_bootstrap=10)
    assert score.value == (100.0 if name in LOWER_IS_BETTER else 0.0)


@every_metric_of_references
def test_empty_references_do_not_crash(name):
    metric = load_metric(name)
    some_text, nothing = metric.sample_scores(["some text", ""], [[""], [""]])
    assert some_text == 0.0
    # Two empty texts agree by those metrics that define the case; BLEU, chrF and ROUGE find no match to count.
    assert nothing == (1.0 if name in AGREE_ON_NOTHING else 0.0)
    assert np.isfinite(metric.corpus_score(["some text", ""], [[""], [""]], n_bootstrap=10).high)


@every_metric
def test_unusable_examples_are_refused_with_a_sentence(name):
    metric = load_metric(name)
    identity = np.arange(2)[None]
    with pytest.raises(ValueError, match="no examples"):
        metric.corpus_score([], [])
    with pytest.raises(ValueError, match="no examples"):
        metric.sample_scores([], [])
    for call in (metric.sample_scores, metric.corpus_score):
        with pytest.raises(ValueError, match="2 predictions for 3 lists"):
            call(["a", "b"], [["a"], ["b"], ["c"]])
        with pytest.raises(ValueError, match="example 1 are one text"):
            call(["a", "b"], [["a"], "b"])
        with pytest.raises(ValueError, match="example 1 has no reference"):
            call(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="prediction 0 is a NoneType"):
        metric.resampled_scores([None, "b"], [["a"], ["b"]], identity)
    with pytest.raises(ValueError, match=r"example 0 are not all texts: \['a', None\]"):
        metric.sample_scores(["a"], [["a", None]])


@every_metric
def test_unknown_option_is_named_with_its_metric(name):
    with pytest.raises(ValueError, match=rf"metric {name}: unknown option 'nonsense'"):
        load_metric(name, nonsense=1)


def test_bad_bootstrap_settings_are_refused(corpus):
    metric = load_metric("exact_match")
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, found 95"):
        metric.corpus_score(*corpus, confidence=95)
    with pytest.raises(ValueError, match="must not be negative, found -1"):
        metric.corpus_score(*corpus, n_bootstrap=-1)


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    """200 samples of 60 answers that are right with probability 0.6; 90 % intervals must cover 60 about 180 times."""
    rng, metric = np.random.default_rng(7), load_metric("exact_match")
    covered = 0
    for trial in range(200):
        predictions = ["right" if right else "wrong" for right in rng.random(60) < 0.6]
        score = metric.corpus_score(predictions, [["right"]] * 60, n_bootstrap=200, confidence=0.9, seed=trial)
        covered += score.low <= 60 <= score.high
    assert 165 <= covered <= 195  # 180 +- 3.5 standard deviations (4.2)
