"""BLEU, chrF and TER: by hand, and against sacreBLEU's public interface."""

import math
import random

import numpy as np
import pytest
import sacrebleu.tokenizers.tokenizer_ja_mecab as japanese
import sacrebleu.tokenizers.tokenizer_ko_mecab as korean
from sacrebleu.metrics import BLEU, CHRF, TER

from pipeline.metrics import load_metric
from pipeline.metrics.resampling import bootstrap_indices
from pipeline.metrics.sacrebleu_metric import short_references

CAT, MAT, MATS = "the cat sat on mats", "the cat sat on the mat", "a cat lay on mats"


def test_bleu_by_hand():
    """Of the prediction's n-grams 4/5, 3/4, 2/3 and 1/2 are in the reference: their product is 1/5.

    The prediction has 5 words, the reference 6, so the brevity penalty is exp(1 - 6/5). Together:
    100 x 0.2^(1/4) x exp(-0.2) = 100 x 0.6687403 x 0.8187308 = 54.7518.
    """
    metric = load_metric("bleu")
    assert metric.corpus_score([CAT], [[MAT]], n_bootstrap=0).value == pytest.approx(54.7518, abs=1e-4)
    assert metric.sample_scores([CAT], [[MAT]]) == pytest.approx([0.547518], abs=1e-6)


def test_bleu_with_two_references_by_hand():
    """The second reference has `mats` and `on mats`: 5/5, 4/4, 2/3 and 1/2. It is as long, so there is no penalty."""
    expected = 100 * (1 / 3) ** 0.25  # 75.98
    assert load_metric("bleu").corpus_score([CAT], [[MAT, MATS]], n_bootstrap=0).value == pytest.approx(expected)


def test_short_sentences_by_hand():
    """`the dog` against `the cat`: 1/2 of the words; no pair, smoothed to 1/2; no longer n-grams. The root of 1/4."""
    scores = load_metric("bleu").sample_scores(["the dog", "cat"], [["the cat"], ["cat"]])
    assert scores == pytest.approx([0.5, 1.0])


SHORT = [["yes"], ["New York"], ["no"], ["the cat sat on the mat"]]


def test_corpus_bleu_of_short_references_warns():
    with pytest.warns(UserWarning, match=r"^bleu: 75% of the references .* 4 words.* exact_match, token_f1 or chrf"):
        load_metric("bleu").corpus_score([text for [text] in SHORT], SHORT, n_bootstrap=0)


@pytest.mark.parametrize(
    ("metric", "references"),
    [
        (load_metric("bleu"), SHORT[2:]),  # half of them
        (load_metric("bleu"), [["yes", "yes, as far as I know"]]),
        (load_metric("bleu", effective_order=True), SHORT),
        (load_metric("bleu", max_ngram_order=1), SHORT),
        (load_metric("bleu", "th"), [["ข้าวผัด"]]),  # characters are its words
        (load_metric("chrf"), SHORT),
        (load_metric("exact_match"), SHORT),
    ],
)
def test_metrics_that_take_short_references(metric, references):
    assert short_references(metric, references) is None


def test_chrf_by_hand():
    """`ab` against `abc`, single characters: precision 1, recall 2/3, so F2 = 5 x 2/3 / (4 + 2/3) = 5/7."""
    metric = load_metric("chrf", char_order=1)
    assert metric.sample_scores(["ab"], [["abc"]]) == pytest.approx([5 / 7])
    assert metric.corpus_score(["ab"], [["abc"]], n_bootstrap=0).value == pytest.approx(500 / 7)


def test_ter_by_hand_points_down_and_its_samples_up():
    """One wrong word of four is an error rate of 25; 20 words where 2 were wanted one of 1000, which is worth 0."""
    metric = load_metric("ter")
    assert not metric.higher_is_better
    assert metric.corpus_score(["a b c d"], [["a b x d"]], n_bootstrap=0).value == pytest.approx(25.0)
    assert metric.corpus_score(["x " * 20], [["a b"]], n_bootstrap=0).value == pytest.approx(1000.0)
    assert metric.sample_scores(["a b c d", "x " * 20], [["a b x d"], ["a b"]]) == pytest.approx([0.75, 0.0])


def test_ter_divides_by_the_mean_length_of_the_references_there_are():
    """One edit to the nearer reference; lengths 4 and 6, mean 5. The second example has 5, not the mean of 5 and 0."""
    references = [["a b x d", "p q r s t u"], ["a b c d e"]]
    score = load_metric("ter").corpus_score(["a b c d", "a b c d e"], references, n_bootstrap=0)
    assert score.value == pytest.approx(100 * 1 / (5 + 5))


@pytest.mark.parametrize(
    ("name", "options", "scorer"),
    [
        ("bleu", {}, BLEU()),
        ("bleu", {"lowercase": True, "tokenize": "intl"}, BLEU(lowercase=True, tokenize="intl")),
        ("bleu", {"smooth_method": "add-k", "smooth_value": 2}, BLEU(smooth_method="add-k", smooth_value=2)),
        ("chrf", {}, CHRF()),
        ("chrf", {"word_order": 2}, CHRF(word_order=2)),
        ("ter", {}, TER()),
        ("ter", {"normalized": True, "case_sensitive": True}, TER(normalized=True, case_sensitive=True)),
    ],
)
def test_to_the_last_digit_as_sacrebleu(name, options, scorer, corpus):
    predictions, references = corpus
    # Up to three references: the shorter lists end in None.
    streams = [[texts[k] if k < len(texts) else None for texts in references] for k in range(3)]
    expected = scorer.corpus_score(predictions, streams).score
    metric = load_metric(name, **options)
    assert metric.corpus_score(predictions, references, n_bootstrap=0).value == expected
    assert metric.resampled_scores(predictions, references, np.arange(8)[None]).tolist() == [expected]
    signature = str(scorer.get_signature())
    assert metric.corpus_score(predictions, references, n_bootstrap=0).signature == signature


def test_missing_references_are_not_empty_references():
    """Were the shorter list filled up with "", the brevity penalty would take length 0 as the closest."""
    references = [["one two three four five six seven", "something else of the same length really"], [MAT]]
    predictions = ["one two three four five six seven", "the cat"]
    score = load_metric("bleu").corpus_score(predictions, references, n_bootstrap=0).value
    # 9 of 9 words, 7 of 7 pairs and all longer n-grams match; 9 words against 7 + 6.
    assert score == pytest.approx(100 * math.exp(1 - 13 / 9))


def test_bootstrap_agrees_with_sacrebleus(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    rng = random.Random(0)
    references = [" ".join(rng.choices("abcdefgh", k=12)) for _ in range(60)]
    predictions = ["".join(c if rng.random() < 0.9 else "x" for c in text) for text in references]
    theirs = BLEU().corpus_score(predictions, [references], n_bootstrap=500)
    metric = load_metric("bleu")
    resampled = metric.resampled_scores(
        predictions, [[text] for text in references], bootstrap_indices(60, 500, 12345)
    )
    assert resampled.mean() == pytest.approx(theirs._mean, rel=1e-9)
    # sacreBLEU reports half the width between the order statistics nearest the percentiles.
    score = metric.corpus_score(predictions, [[text] for text in references], n_bootstrap=500, seed=12345)
    assert (score.high - score.low) / 2 == pytest.approx(theirs._ci, rel=0.05)


@pytest.mark.parametrize(
    ("language", "tokenizer"), [(None, "13a"), ("de", "13a"), ("zh", "zh"), ("zh-CN", "zh"), ("ZH_Hans", "zh")]
)
def test_bleu_tokenizer_follows_the_language(language, tokenizer):
    assert f"tok:{tokenizer}|" in load_metric("bleu", language).signature
    assert "tok:char|" in load_metric("bleu", language, tokenize="char").signature


def test_chinese_is_scored_by_character():
    """Five of the six characters are right; for the 13a tokenizer the sentence is one word, and wrong."""
    prediction, reference = "我今天很高兴", "我今天不高兴"
    assert load_metric("bleu", "zh").sample_scores([prediction], [[reference]])[0] > 0.3
    assert load_metric("bleu", "de").sample_scores([prediction], [[reference]]) == [0.0]
    assert load_metric("ter", "zh").sample_scores([prediction], [[reference]]) == pytest.approx([5 / 6])
    assert load_metric("ter").sample_scores([prediction], [[reference]]) == [0.0]
    assert "norm:no|" in load_metric("ter", "zh", normalized=False).signature


@pytest.mark.parametrize(("language", "module"), [("ja", japanese), ("ko", korean)])
def test_missing_mecab_says_what_to_install(language, module, monkeypatch):
    monkeypatch.setattr(module, "MeCab", None)
    with pytest.raises(ValueError, match=rf"metric bleu: .* pip install 'sacrebleu\[{language}\]'") as caught:
        load_metric("bleu", language)
    assert "\n" not in str(caught.value)


def test_options_reach_the_scorer():
    assert load_metric("bleu", lowercase=True).sample_scores(["A CAT"], [["a cat"]]) == pytest.approx([1.0])
    assert load_metric("bleu").sample_scores(["A CAT"], [["a cat"]]) == [0.0]
    assert "nw:2|" in load_metric("chrf", word_order=2).signature
    assert load_metric("ter", case_sensitive=True).sample_scores(["A"], [["a"]]) == [0.0]
    assert load_metric("ter").sample_scores(["A"], [["a"]]) == [1.0]
