"""Error rates of texts that Whisper's normalizers make alike."""

import pytest

from pipeline.metrics import load_metric


def rate(prediction: str, reference: str, **options) -> float:
    return load_metric("wer", "en", **options).corpus_score([prediction], [[reference]], n_bootstrap=1).value


def test_without_a_normalizer_case_and_punctuation_count():
    assert rate("Hello, World", "hello world") == 100
    assert rate("Hello, World", "hello world", normalizer=None) == 100


def test_basic_removes_case_punctuation_and_brackets():
    assert rate("Hello, World [noise]", "hello world", normalizer="basic") == 0
    assert rate("it's two", "it is two", normalizer="basic") > 0


def test_english_writes_contractions_and_numbers_alike():
    assert rate("It's twenty one", "it is 21", normalizer="english") == 0
    assert "normalizer:english" in load_metric("cer", "en", normalizer="english").signature


def test_an_unknown_normalizer_is_named():
    with pytest.raises(ValueError, match="metric wer: normalizer: 'german' is not one of basic, english"):
        load_metric("wer", normalizer="german")
    with pytest.raises(ValueError, match="metric cer: unknown option 'normaliser'"):
        load_metric("cer", normaliser="basic")


def test_edits_are_counted_on_normalised_texts():
    metric = load_metric("wer", "en", normalizer="basic")
    assert metric.statistics(["ONE, two!", "x"], [["one three"], ["a b."]]).tolist() == [[1, 2], [2, 2]]
    assert metric.sample_scores(["ONE, two!"], [["one three"]]) == [0.5]
