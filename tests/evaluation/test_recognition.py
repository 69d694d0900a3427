"""Word errors by kind, by a column and of the best of n samples, against numbers counted by hand."""

import pytest
from datasets import Dataset

from pipeline.evaluation.pages.recognition_tables import recognition_tables
from pipeline.evaluation.recognition import WordErrors, count_errors, recognition_errors, word_metric
from pipeline.metrics import load_metric

WER = load_metric("wer")


@pytest.mark.parametrize(
    ("reference", "hypothesis", "kinds"),
    [
        ("one two", "one two", (0, 0, 0)),
        ("one two", "one four", (1, 0, 0)),
        ("one two", "two", (0, 1, 0)),
        ("one", "one two three", (0, 0, 2)),
        ("", "one", (0, 0, 1)),
        ("one two", "", (0, 2, 0)),
        ("one two three", "two four three five", (1, 1, 2)),
    ],
)
def test_errors_are_counted_by_kind(reference, hypothesis, kinds):
    errors = count_errors(reference.split(), hypothesis.split())
    if kinds == (1, 1, 2):  # either of two alignments of three edits
        assert errors.edits == 3 and errors.insertions - errors.deletions == 1
    else:
        assert errors == WordErrors(*kinds, len(reference.split()))


def recognise(texts, references, samples=(), column=None, metric=WER, **columns):
    rows = Dataset.from_dict({"prompt": ["clip"] * len(texts), **columns})
    copies = len(samples) // len(texts) if samples else 1
    written, drawn = {"ppo": texts}, {"ppo": samples}
    return recognition_errors(written, drawn, [[text] for text in references], metric, rows, column, copies)["ppo"]


def test_totals_are_those_of_the_metric_and_groups_add_up():
    texts, references = ["one two", "three", "x y z"], ["one four", "three five", "x"]
    found = recognise(texts, references, speaker=["ann", "bob", "ann"])
    assert found.total == WordErrors(1, 1, 2, 5) and found.wer == pytest.approx(80)
    assert found.wer == pytest.approx(WER.corpus_score(texts, [[r] for r in references], n_bootstrap=1).value)
    assert found.column == "speaker" and found.groups == {"ann": WordErrors(1, 0, 2, 3), "bob": WordErrors(0, 1, 0, 2)}
    assert [(text.index, text.edits) for text in found.worst] == [(2, 2), (0, 1), (1, 1)]


def test_the_column_may_be_named_and_one_of_many_values_is_left_out():
    found = recognise(["one"] * 2, ["one"] * 2, column="room", room=["a", "b"], speaker=["x", "x"])
    assert found.column == "room" and set(found.groups) == {"a", "b"} and found.worst == []
    assert recognise(["one"] * 51, ["one"] * 51, speaker=[str(n) for n in range(51)]).column is None


def test_of_several_references_the_closest_counts():
    rows = Dataset.from_dict({"prompt": ["clip"] * 2})
    references = [["one two three four", "five"], ["six seven", "six"]]
    found = recognition_errors({"a": ["five", "six"]}, {"a": ["five", "six"]}, references, WER, rows, None, 1)["a"]
    assert found.total == WordErrors(0, 0, 0, 2) and found.wer == 0 and found.oracle == [0] and found.worst == []


def test_the_oracle_is_the_expected_best_of_the_samples():
    samples = ["one two", "one", "three", "four"]  # edits 0 and 1 of two words, 0 and 1 of one word
    found = recognise(["one two", "three"], ["one two", "three"], samples)
    assert found.oracle == pytest.approx([100 * (0.5 + 0.5) / 3, 0])


def test_texts_are_compared_as_the_metric_normalises_them():
    metric = load_metric("wer", "en", normalizer="basic")
    found = recognise(["ONE, Two!"], ["one three"], metric=metric)
    assert found.total == WordErrors(1, 0, 0, 2) and found.worst[0].hypothesis == "one two"


def test_a_report_without_wer_has_none():
    assert word_metric([load_metric("bleu"), load_metric("cer")]) is None
    assert word_metric([load_metric("cer"), WER]) is WER
    assert recognition_tables(type("Report", (), {"recognition": {}})()) == []


def test_the_tables_say_that_lower_is_better():
    found = recognise(["one"], ["two"], ["one", "two"], speaker=["ann"])
    kinds, group, worst = recognition_tables(type("Report", (), {"recognition": {"ppo": found}})())
    assert kinds.rows == [["ppo", "100.00", "1", "1", "0", "0", "0.00 (n = 2)"]] and "Lower is better" in kinds.note
    assert group.rows == [["ann", "1", "100.00"]] and group.title == "WER by speaker, %"
    assert worst.rows == [["0", "1", "two", "one"]]
