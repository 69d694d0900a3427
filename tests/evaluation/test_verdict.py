"""The words of the report against the figures they come from."""

from dataclasses import replace

import pytest
from evaluation_toys import BAD, BLEU, GOOD, MIXED, TER, make_report

from pipeline.evaluation.report import SystemComparison
from pipeline.evaluation.verdict import _effect, verdict

HALF = [0.5] * 12
RISING = [0.5 + 0.03 * i for i in range(12)]


@pytest.mark.parametrize(
    ("sft", "ppo", "metric", "sentence"),
    [
        (BAD, GOOD, BLEU, "PPO is better than SFT: bleu +"),
        (GOOD, BAD, BLEU, "PPO is worse than SFT: bleu -"),
        (BAD, GOOD, TER, "PPO is better than SFT: ter -"),  # an error rate: less is better
        (GOOD, BAD, TER, "PPO is worse than SFT: ter +"),
        (MIXED, MIXED, BLEU, "No evidence that PPO changed the quality of SFT: bleu +0.00 "),
        (GOOD[:-1] + BAD[-1:], GOOD, BLEU, "No evidence that PPO changed the quality of SFT: bleu +"),
    ],
)
def test_the_verdict_is_one_sentence(sft, ppo, metric, sentence):
    found = make_report({"sft": sft, "ppo": ppo}, metrics=(metric,))[0].verdict
    assert found.startswith(sentence) and found.count("\n") == 0
    assert "95 % interval" in found and "p = " in found


def comparison(**changes) -> SystemComparison:
    return replace(SystemComparison("sft", "ppo", "bleu", 1.0, 0.1, 2.0, 0.049, 0.049, 0.04, 0.2, 0.3, 0.1), **changes)


def test_the_verdict_takes_the_p_value_at_its_word():
    assert verdict([comparison()], "bleu").startswith("PPO is better")
    assert verdict([comparison(p_value=0.05)], "bleu").startswith("No evidence")
    assert "nothing to compare" in verdict([], "bleu")
    assert verdict([], "bleu") == verdict([comparison(a="base", b="sft")], "bleu")


def test_findings_name_the_other_measures_with_corrected_p():
    scores = {"sft": HALF, "ppo": RISING}
    found = make_report({"sft": BAD, "ppo": GOOD}, scores, metrics=(BLEU, TER))[0].findings
    assert "Holm" in found[0] and "better: ter -" in found[0]
    assert "reward +0.165 (p = 0.015)" in found[0] and "worse" not in found[0]
    assert any("randomisation agrees" in line and "p = 0.005" in line for line in found)
    assert any("scores higher on 100%, lower on 0%" in line for line in found)
    assert any(line.startswith("PPO is 0.50 nats per completion from SFT") for line in found)
    assert make_report({"base": BAD, "sft": GOOD})[0].findings == []


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (None, "everywhere by the same amount"),
        (-0.05, "negligible (d = -0.05)"),
        (0.2, "small"),
        (0.5, "medium"),
        (0.9, "large"),
    ],
)
def test_the_effect_in_words(effect, words):
    assert words in _effect(comparison(effect_size=effect))


def test_the_control_decides_whether_the_reward_explains_the_gain():
    earned = make_report({"sft": BAD, "ppo": GOOD, "control": BAD})[0].findings
    assert any("bleu by +0.00" in line and "the reward explains" in line for line in earned)
    given = make_report({"sft": BAD, "ppo": GOOD, "control": GOOD})[0]
    assert any("explains no gain" in line for line in given.findings)
    assert given.warnings == []  # a control may well write what PPO writes
    assert not any("control" in line for line in make_report({"sft": BAD, "ppo": GOOD})[0].findings)


def test_best_of_n_is_put_beside_what_ppo_reaches():
    both = [text for good, bad in zip(GOOD, BAD, strict=True) for text in (bad, good)]
    found = make_report({"sft": BAD, "ppo": GOOD}, samples={"sft": both, "ppo": both})[0].findings
    assert "the best of 2 SFT samples" in found[-1] and "would do for PPO's" in found[-1]
    never = [text for text in BAD for _ in range(2)]
    found = make_report({"sft": BAD, "ppo": GOOD}, samples={"sft": never, "ppo": both})[0].findings
    assert "does not reach PPO's" in found[-1]


def test_no_warning_where_nothing_is_wrong():
    assert (
        make_report({"base": [""] * 12, "sft": MIXED, "ppo": GOOD})[0].warnings == []
    )  # an untrained base is no news


def test_the_same_texts_and_the_same_weights_are_told_apart():
    found = make_report({"base": BAD, "sft": MIXED, "ppo": MIXED})[0].warnings
    (warning,) = found
    assert "sft and ppo" in warning and "same text" in warning
    found = make_report({"sft": MIXED, "ppo": MIXED}, same_weights=["ppo"])[0].warnings
    (warning,) = found
    assert "sft and ppo" in warning and "identical weights" in warning


def test_empty_and_unfinished_completions():
    texts = {"sft": MIXED, "ppo": ["", *MIXED[1:]]}
    (warning,) = make_report(texts)[0].warnings
    assert "ppo wrote nothing" in warning and "1 of 12" in warning
    found = make_report({"sft": MIXED, "ppo": GOOD}, changes={"ppo": {"finished": False}})[0].warnings
    (warning,) = found
    assert "ppo did not end" in warning and "100%" in warning


def test_reward_hacking_is_a_reward_that_rises_while_other_metrics_fall():
    scores, texts = {"sft": HALF, "ppo": RISING}, {"sft": GOOD, "ppo": BAD}
    found = make_report(texts, scores)[0].warnings
    assert "reward rose by +0.1650" in found[0] and "bleu -" in found[0]
    assert not any("reward rose" in line for line in make_report(texts, scores, rewards=["bleu"])[0].warnings)
    assert not any("reward rose" in line for line in make_report(texts, {"sft": HALF, "ppo": HALF})[0].warnings)
    better = {"sft": BAD, "ppo": GOOD}
    assert not any("reward rose" in line for line in make_report(better, scores)[0].warnings)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"kl_to_sft": 20.0}, "ppo is far from SFT: "),
        ({"completion_ids": [1] * 40}, "ppo writes 40.0 tokens where sft writes 8.0 "),
        ({"entropy": 0.1}, "ppo lost its entropy: "),
    ],
)
def test_drift(change, warning):
    assert any(
        line.startswith(warning)
        for line in make_report({"sft": MIXED, "ppo": GOOD}, changes={"ppo": change})[0].warnings
    )


def test_collapse_repetition_and_lost_variety():
    one = ["the cat sat on the mat"] * 12
    found = make_report({"sft": GOOD, "ppo": one})[0].warnings
    assert any("ppo collapsed" in line and "100%" in line for line in found)
    assert any(line.startswith("ppo lost variety: distinct bigrams") for line in found)
    stuck = [f"{text} so it is so it is so it is" for text in GOOD]
    assert any(
        line.startswith("ppo repeats itself: ") for line in make_report({"sft": GOOD, "ppo": stuck})[0].warnings
    )
