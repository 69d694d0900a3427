"""SQuAD's metrics, error rates, distinct-n and ROUGE-Lsum: by hand, and against jiwer and evaluate where they are."""

import importlib
import importlib.util

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipeline.metrics import load_metric
from pipeline.metrics.squad import squad_words
from pipeline.rewards import RewardConfig, build_rewards


def corpus_value(name, predictions, references, language=None):
    return load_metric(name, language).corpus_score(predictions, references, n_bootstrap=0).value


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Eiffel-Tower!", ["eiffeltower"], 1, 1),
        ("a cat, the dog", ["dog cat"], 0, 1),  # the same words in another order
        ("the quick fox", ["quick brown fox.", "fox"], 0, 0.8),  # 2 of 2 and 3 words; 2 x 1 / 3 of the other
        ("in 1963", ["1963"], 0, 2 / 3),
        ("„1963“", ["1963"], 0, 0),  # only ASCII punctuation goes
        ("the", ["an"], 1, 1),  # both have no words left
        ("the", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
    ],
)
def test_squad_by_hand(prediction, references, exact, f1):
    assert load_metric("squad_em").sample_scores([prediction], [references]) == [exact]
    assert load_metric("squad_f1").sample_scores([prediction], [references]) == pytest.approx([f1])
    assert load_metric("squad_f1", "de").sample_scores([prediction], [references]) == pytest.approx([f1])


def test_squad_removes_punctuation_before_articles_as_its_script_does():
    assert squad_words("A-B: The 'a' to z.") == ["ab", "to", "z"]


def test_error_rates_by_hand():
    """`a x c d` for `a b c`: one word is another, one is too many. `d` for `d e`: one is missing. 3 edits, 5 words.

    In characters: `a x c d` needs 3 edits for 5 characters (x, a space, d), `d` 2 for 3.
    """
    predictions, references = ["a x  c d", " d "], [["a b c"], ["d e"]]
    assert corpus_value("wer", predictions, references) == pytest.approx(60)
    assert load_metric("wer").sample_scores(predictions, references) == pytest.approx([1 / 3, 1 / 2])
    assert corpus_value("cer", ["a x c d", " d "], references) == pytest.approx(100 * 5 / 8)
    # More edits than words: the rate is above 100, the reward is 0.
    assert corpus_value("wer", ["x y z"], [["a"]]) == pytest.approx(300)
    assert load_metric("wer").sample_scores(["x y z"], [["a"]]) == [0.0]


def test_error_rates_of_several_and_of_empty_references():
    """Of several references the lowest rate counts; an empty one adds edits and no words."""
    wer = load_metric("wer")
    assert wer.statistics(["a b"], [["x y", "a b c d", "a"]]).tolist() == [[2, 4]]
    assert corpus_value("wer", ["x", "a b"], [[""], ["a b"]]) == pytest.approx(50)
    assert corpus_value("wer", [""], [[""]]) == 0 and corpus_value("wer", ["a b"], [[""]]) == pytest.approx(200)


def test_words_of_a_language_without_spaces_are_characters():
    assert corpus_value("wer", ["我很"], [["我很好"]], "zh") == pytest.approx(100 / 3)
    assert corpus_value("wer", ["我很"], [["我很好"]]) == pytest.approx(100)


def test_resampled_error_rates_are_sums_of_edits_over_sums_of_words():
    """Edits and words by example: 1 of 1, 0 of 3. Twice the first and once the second: 2 edits, 5 words."""
    metric = load_metric("wer")
    rates = metric.resampled_scores(["x", "a b c"], [["y"], ["a b c"]], np.array([[0, 0, 1], [1, 1, 1]]))
    assert rates.tolist() == pytest.approx([40, 0])


def test_distinct_by_hand():
    """`a b a` and `b c`: words a b a b c, 3 different of 5; pairs ab ba bc, 3 of 3. `b c` twice: 4 of 5 pairs."""
    texts, references = ["A b a", "b c."], [["-"]] * 2
    assert corpus_value("distinct1", texts, references) == pytest.approx(60)
    assert corpus_value("distinct2", texts, references) == pytest.approx(100)
    assert load_metric("distinct1").sample_scores(texts, references) == pytest.approx([2 / 3, 1])
    assert load_metric("distinct2").sample_scores(["a", ""], references) == [0, 0]
    twice = load_metric("distinct2").resampled_scores(texts, references, np.array([[0, 1, 1]]))
    assert twice.tolist() == pytest.approx([75])


def test_the_interval_of_distinct_lies_around_the_score():
    texts = [f"a word number {i} of {i % 7}" for i in range(40)]
    score = load_metric("distinct1").corpus_score(texts, [["-"]] * 40, n_bootstrap=200)
    assert score.low < score.value < score.high
    resampled = load_metric("distinct1").resampled_scores(texts, [["-"]] * 40, np.full((1, 40), 8))
    assert resampled[0] == pytest.approx(100 * 6 / (40 * 6))  # 40 copies of one text of six words


def test_rouge_lsum_takes_lines_for_sentences():
    """The two lines change places: word for word the longest common order is half, line by line it is all."""
    prediction, reference = "the cat sat\nall is well", "all is well\nthe cat sat"
    assert load_metric("rougeL").sample_scores([prediction], [[reference]]) == pytest.approx([0.5])
    assert load_metric("rougeLsum").sample_scores([prediction], [[reference]]) == pytest.approx([1.0])
    expected = RougeScorer(["rougeLsum"]).score(reference, "the cat\nis well")["rougeLsum"].fmeasure
    assert load_metric("rougeLsum").sample_scores(["the cat\nis well"], [[reference]]) == pytest.approx([expected])


@pytest.mark.parametrize("name", ["squad_f1", "squad_em", "wer", "cer", "rougeLsum", "distinct2"])
def test_each_is_a_reward_between_0_and_1(name):
    [reward] = build_rewards([RewardConfig(name)])
    good, bad = reward.function([], ["nine mice sat here", "x x x"], references=[["nine mice sat here"]] * 2)
    assert good == pytest.approx(1.0) and bad == pytest.approx(1 / 2 if name == "distinct2" else 0.0, abs=0.12)


@pytest.mark.skipif(importlib.util.find_spec("jiwer") is None, reason="jiwer is not installed")
def test_error_rates_are_those_of_jiwer(corpus):
    jiwer = importlib.import_module("jiwer")
    predictions, references = corpus[0], [texts[0] for texts in corpus[1]]
    for name, rate in (("wer", jiwer.wer), ("cer", jiwer.cer)):
        ours = corpus_value(name, predictions, [[text] for text in references])
        assert ours == pytest.approx(100 * rate(references, predictions))
    for prediction in ("", "a b"):
        assert corpus_value("wer", [prediction], [[""]]) == pytest.approx(100 * jiwer.wer("", prediction))
