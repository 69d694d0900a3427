"""Pairs from samples and references by hand, and every reason for which a pair is dropped."""

from dataclasses import replace

import pytest

from pipeline.rewards.pairs import (
    CHOICE,
    EMPTY,
    EQUAL,
    HELD_OUT,
    KNOWN,
    LONG,
    NARROW,
    REPEATED,
    SWAPPED,
    TRAIN,
    Pair,
    RankedText,
    check_pairs,
    prompt_pairs,
    read_records,
    scaled_margins,
    split_held_out,
    write_lines,
)
from pipeline.rewards.pairs.settings import SampledPairs

SAMPLES = [RankedText("b", [2], 0.5), RankedText("a", [1], 0.9), RankedText("c", [3], 0.2), RankedText("a", [1], 0.9)]
REFERENCE = [RankedText("r", [9], 1.0)]


def pair(prompt="p", chosen="good", rejected="bad", split=TRAIN, margin: float | None = 0.5, ids=(1, 2)) -> Pair:
    return Pair(split, 0, prompt, chosen, rejected, list(ids), list(ids), margin, "data")


def fits(pair: Pair) -> bool:
    return pair.prompt != "long"


def found(settings: SampledPairs, samples=SAMPLES) -> list[tuple[str, str, float]]:
    pairs = prompt_pairs(settings, "p", TRAIN, 7, samples, REFERENCE)
    assert {(p.prompt, p.split, p.row) for p in pairs} <= {("p", TRAIN, 7)}
    return [(p.chosen, p.rejected, round(p.margin, 6)) for p in pairs]


def test_samples_are_ranked_and_equal_ones_count_once():
    assert found(SampledPairs(pairs_per_prompt=9)) == [("a", "c", 0.7), ("a", "b", 0.4), ("b", "c", 0.3)]
    assert found(SampledPairs()) == [("a", "c", 0.7)]
    assert found(SampledPairs(), SAMPLES[:1]) == []


def test_references_against_samples_in_the_order_of_sampling():
    one = SampledPairs(origins=("references",))
    assert found(one) == [("r", "b", 0.5)]
    # A sample that is the reference teaches nothing.
    assert found(one, [RankedText("r", [9], 1.0), *SAMPLES]) == [("r", "b", 0.5)]
    both = SampledPairs(origins=("sft", "references"), pairs_per_prompt=2)
    assert found(both) == [("a", "c", 0.7), ("a", "b", 0.4), ("r", "b", 0.5), ("r", "a", 0.1)]


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        (EMPTY, pair(chosen=" ")),
        (EMPTY, pair(rejected="")),
        (EQUAL, pair(rejected="good ")),
        (NARROW, pair(margin=0.05)),
        (LONG, pair("long")),
        (REPEATED, pair("q", "x", "y")),
        (KNOWN, pair("held", "x", "y")),
    ],
)
def test_a_pair_that_teaches_nothing_is_dropped_and_counted(reason, bad):
    good = [pair("q", "x", "y"), pair("held", split=HELD_OUT)]
    kept, counts = check_pairs([*good, bad], fits, 0.1)
    assert kept == good
    assert counts.dropped == {reason: 1} and counts.found == 3 and counts.kept == {TRAIN: 1, HELD_OUT: 1}
    assert counts.sentences() == ["pairs: 1 for training and 1 held out, of 3", f"dropped 1: {reason}"]


def test_swapped_pairs_contradict_each_other_and_both_go():
    pairs = [pair(chosen="x", rejected="y"), pair(chosen="y", rejected="x"), pair("q"), pair("h", split=HELD_OUT)]
    kept, counts = check_pairs(pairs, fits, 0.0)
    assert kept == pairs[2:] and counts.dropped == {SWAPPED: 2}


@pytest.mark.parametrize(("split", "where"), [(TRAIN, "held out"), (HELD_OUT, "to train on")])
def test_nothing_left_is_refused_with_the_reasons(split, where):
    pairs = [pair(split=split), pair(chosen="same", rejected="same", split=split)]
    message = f"reward.pairs: no pair is left {where}; pairs: .*; dropped 1: {EQUAL}"
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs, fits, 0.0)


def test_half_of_the_held_out_prompts_choose_the_checkpoint():
    pairs = [pair("t"), *(pair(f"p{n % 5}", f"good {n}", split=HELD_OUT) for n in range(15))]
    divided, counts = split_held_out(*check_pairs(pairs, fits, 0.0), seed=3)
    assert counts.kept == {TRAIN: 1, CHOICE: 6, HELD_OUT: 9} and counts.found == 16
    assert "1 for training, 6 to choose the checkpoint and 9 held out" in counts.sentences()[0]
    sides = [{p.prompt for p in divided if p.split == split} for split in (CHOICE, HELD_OUT)]
    assert [len(side) for side in sides] == [2, 3] and not sides[0] & sides[1]
    assert [replace(p, split="") for p in divided] == [replace(p, split="") for p in pairs]
    assert split_held_out(*check_pairs(pairs, fits, 0.0), seed=3)[0] == divided
    assert any(split_held_out(*check_pairs(pairs, fits, 0.0), seed=seed)[0] != divided for seed in range(5))


def test_one_held_out_prompt_cannot_choose_and_judge():
    pairs = [pair("t"), pair("p", "a", split=HELD_OUT), pair("p", "b", split=HELD_OUT)]
    with pytest.raises(ValueError, match=r"all held-out pairs have one prompt.*load_best_model_at_end"):
        split_held_out(*check_pairs(pairs, fits, 0.0), seed=0)


def test_chat_prompts_are_told_apart_by_their_content():
    chats = [[{"role": "user", "content": text}] for text in ("a", "b")]
    pairs = [pair(chats[0]), pair(chats[1], split=HELD_OUT), pair([dict(chats[1][0])])]
    kept, counts = check_pairs(pairs, fits, 0.0)
    assert len(kept) == 2 and counts.dropped == {KNOWN: 1}


def test_margins_average_the_weight_over_training_pairs():
    pairs = [pair(margin=1.0), pair(margin=3.0), pair(split=HELD_OUT, margin=4.0)]
    assert [p.margin for p in scaled_margins(pairs, 0.5)] == [0.25, 0.75, 1.0]
    assert [p.margin for p in scaled_margins(pairs, 0.0)] == [None] * 3
    assert [p.margin for p in scaled_margins([*pairs, pair(margin=None)], 1.0)] == [None] * 4


def test_pairs_are_read_back_as_written(tmp_path):
    pairs = [pair("ü\u2028", margin=None), pair([{"role": "user", "content": "x"}])]
    write_lines(pairs, tmp_path / "pairs.jsonl")
    assert read_records(Pair, tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"origins": ()}, "reward.pairs.from: must be one or both of sft, references, found"),
        ({"origins": ("ppo",)}, "found \\['ppo'\\]; for a preference data set name its path"),
        ({"samples": 1}, "reward.pairs.samples: must be at least 2, found 1"),
        ({"temperature": 0.0}, "reward.pairs.temperature: must be above 0"),
        ({"top_p": 0.0}, "reward.pairs.top_p"),
        ({"min_margin": 1.0}, "reward.pairs.min_margin: must be in \\[0, 1\\)"),
        ({"prompts": 0}, "reward.pairs.prompts: must be at least 1"),
    ],
)
def test_settings_that_cannot_work(keys, message):
    with pytest.raises(ValueError, match=message):
        SampledPairs(**keys)
