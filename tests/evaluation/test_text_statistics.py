"""What texts look like, by hand."""

from dataclasses import replace

import pytest

from pipeline.evaluation.text_statistics import repetition, text_statistics


def test_repetition_is_the_share_of_trigrams_seen_before():
    assert repetition(["a", "b", "c", "d", "e"]) == 0
    assert repetition(["a", "b", "c", "a", "b", "c"]) == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition(["a"] * 5) == pytest.approx(2 / 3)
    assert repetition(["a", "a"]) == repetition([]) == 0


def test_figures_by_hand():
    texts = ["The cat, the cat", "", "The cat, the cat", "red"]
    found = text_statistics(texts, ["a cat sat", "it is", "x", "red"], ["see the cat", "p", "q", "Red"])
    assert found.length_ratio == pytest.approx(9 / 7)
    assert found.distinct_1 == pytest.approx(3 / 9)  # the, cat, red
    assert found.distinct_2 == pytest.approx(2 / 6)  # the cat, cat the
    assert found.copy_rate == pytest.approx(5 / 9)  # all of the first, none of the third, and red
    assert found.novel_2 == pytest.approx(4 / 6)  # of "the cat the cat", "see the cat" has "the cat" twice
    assert (found.empty, found.most_common, found.repetition) == (0.25, 0.5, 0)


def test_nothing_is_copied_from_a_prompt_that_is_a_sound():
    with_prompts = text_statistics(["red red"], ["red"], ["red"])
    alone = text_statistics(["red red"], ["red"], None)
    assert (with_prompts.copy_rate, with_prompts.novel_2) == (1, 1)
    assert alone == replace(with_prompts, copy_rate=None, novel_2=None)


def test_nothing_written_at_all():
    found = text_statistics(["", ""], ["", ""], ["a", "b"])
    assert (found.length_ratio, found.distinct_1, found.distinct_2, found.copy_rate) == (0, 0, 0, 0)
    assert (found.empty, found.most_common) == (1, 1)
