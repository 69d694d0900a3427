"""Where one system gains on another, by hand."""

import pytest

from pipeline.evaluation.gains import buckets, find_gains

SFT = [0.1, 0.5, 0.5, 0.9, 0.3, 0.2, 0.4, 0.6]
PPO = [0.4, 0.5, 0.4, 0.9, 0.4, 0.2, 0.6, 0.0]
TEXTS = (list("abcdefgh"), list("xbxdxfxx"))
REFERENCES = ["w"] * 4 + ["w w w"] * 2 + ["w w w w"] * 2


def gains():
    return find_gains("sft", "ppo", "bleu", SFT, PPO, TEXTS, REFERENCES)


def test_best_worst_and_typical_examples():
    found = gains()
    assert [g.index for g in found.best] == [0, 6, 4]
    assert [g.index for g in found.worst] == [7, 2]
    assert found.worst[0].gain == pytest.approx(-0.6)
    assert [g.index for g in found.typical] == [4, 6, 0, 2, 7]  # the median gain of those that moved is 0.1
    assert found.changed == 5 / 8


def test_groups_by_length_keep_equal_lengths_together():
    found = gains().by_length
    assert [(b.label, b.count) for b in found] == [("1 word", 4), ("3 words", 2), ("4 words", 2)]
    assert [b.gain for b in found] == pytest.approx([0.05, 0.05, -0.2])
    assert found[2].score_a == pytest.approx(0.5) and found[2].score_b == pytest.approx(0.3)


def test_groups_by_first_pass_quality_are_quarters():
    found = gains().by_quality
    assert sum(b.count for b in found) == 8 and len(found) == 4
    assert found[0].label == "0.10 to 0.20" and found[0].gain == pytest.approx(0.15)
    assert [b.label for b in buckets([1.0] * 8, gains().best * 3, ".2f")] == ["1.00"]


def test_nothing_moved():
    found = find_gains("sft", "ppo", "bleu", SFT, SFT, (TEXTS[0], TEXTS[0]), REFERENCES)
    assert (found.best, found.worst, found.typical, found.changed) == ([], [], [], 0)
