"""The words of the report against the figures they come from."""

from dataclasses import replace

import evaluation_toys
import pytest
from evaluation_toys import BAD, BLEU, GOOD, MIXED, TER, make_report

from pipeline.evaluation.divergence import SampleMeasure
from pipeline.evaluation.report import SystemComparison
from pipeline.evaluation.significance import BOOTSTRAP, MCNEMAR
from pipeline.evaluation.verdict import findings, verdict

HALF = [0.5] * 12
RISING = [0.5 + 0.03 * i for i in range(12)]


@pytest.mark.parametrize(
    ("sft", "ppo", "metric", "sentence"),
    [
        (BAD, GOOD, BLEU, "PPO is better than SFT: bleu +"),
        (GOOD, BAD, BLEU, "PPO is worse than SFT: bleu -"),
        (BAD, GOOD, TER, "PPO is better than SFT: ter -"),  # an error rate: less is better
        (GOOD, BAD, TER, "PPO is worse than SFT: ter +"),
        (MIXED, MIXED, BLEU, "No difference between PPO and SFT is shown: bleu +0.00 "),
        (GOOD[:-1] + BAD[-1:], GOOD, BLEU, "No difference between PPO and SFT is shown: bleu +"),
    ],
)
def test_the_verdict_is_one_line(sft, ppo, metric, sentence):
    found = make_report({"sft": sft, "ppo": ppo}, metrics=(metric,))[0].verdict
    assert found.startswith(sentence) and found.count("\n") == 0
    assert "95 % interval" in found and ("p = " in found or "p < 0.001" in found)


def comparison(**changes) -> SystemComparison:
    figures = {
        "a": "sft",
        "b": "ppo",
        "metric": "bleu",
        "delta": 1.0,
        "low": 0.1,
        "high": 2.0,
        "p_value": 0.049,
        "p_holm": 0.049,
        "p_randomisation": 0.04,
        "wins": 0.3,
        "losses": 0.1,
        "higher_is_better": True,
        "test": BOOTSTRAP,
        "p_bootstrap": 0.049,
        "p_better": 0.6,
        "examples": 2000,
        "standard_error": 0.31,
        "smallest_difference": 0.87,
        "equivalence_margin": 1.51,
        "clusters": 2000,
    }
    return SystemComparison(**{**figures, **changes})


def first_findings(**changes) -> list[str]:
    systems = make_report({"sft": MIXED, "ppo": GOOD})[0].systems
    return findings([comparison(**changes)], systems, {}, "bleu", {})


def test_the_verdict_takes_the_p_value_at_its_word():
    assert verdict([comparison()], "bleu").startswith("PPO is better")
    assert verdict([comparison(p_value=0.05)], "bleu").startswith("No difference between PPO and SFT is shown")
    assert "p < 0.001" in verdict([comparison(p_value=1 / 1001)], "bleu")
    assert "p = 0.002" in verdict([comparison(p_value=2 / 1001)], "bleu")
    assert "nothing to compare" in verdict([], "bleu")
    assert verdict([comparison()], "bleu", 999).startswith("No verdict: eval.n_bootstrap is 999")
    assert verdict([comparison(a="base", b="sft")], "bleu").startswith("sft is better than base: bleu +1.00")


def test_small_differences_are_not_rounded_to_nothing():
    """Metrics of the user may run from 0 to 1."""
    small = {"delta": 0.00412, "low": 0.0021, "high": 0.0062, "standard_error": 0.00104}
    assert "bleu +0.0041 (95 % interval +0.0021 to +0.0062," in verdict([comparison(**small)], "bleu")
    certain = {"delta": -0.0002, "low": -0.0002, "high": -0.0002, "standard_error": 0.0}
    assert "bleu -0.00020 (95 % interval -0.00020" in verdict([comparison(**certain)], "bleu")
    assert "bleu +0.00 (95 % interval -1.00" in verdict([comparison(delta=-0.001, low=-1)], "bleu")
    systems = make_report({"sft": MIXED, "ppo": GOOD})[0].systems
    pairs = [comparison(), *(comparison(a=a, b=b, **small) for a, b in (("sft", "control"), ("control", "ppo")))]
    (line,) = [line for line in findings(pairs, systems, {}, "bleu", {}) if line.startswith("The control")]
    assert "moved bleu by +0.0041" in line and "better than it (+0.0041," in line
    assert not any("-0%" in line for line in first_findings(wins=0.9, losses=0.1))


def test_one_pair_of_models_is_one_question_and_more_are_corrected():
    pairs = [comparison(a="old", b=name, p_value=0.02, p_holm=0.04 * number) for number, name in ((1, "x"), (2, "y"))]
    assert "x is better than old" in verdict(pairs[:1], "bleu") and "p = 0.020" in verdict(pairs[:1], "bleu")
    words = verdict(pairs, "bleu")
    assert "x is better than old" in words and "p = 0.040" in words
    assert "No difference between y and old is shown" in words and "p = 0.080" in words


def test_findings_name_the_other_measures_with_corrected_p():
    scores = {"sft": HALF, "ppo": RISING}
    found = make_report({"sft": BAD, "ppo": GOOD}, scores, metrics=(BLEU, TER))[0].findings
    others = next(line for line in found if "Holm" in line)
    assert "better: ter -" in others and "reward +0.165 (p = 0.0" in others and "worse" not in others
    assert any("paired bootstrap (p < 0.001) agrees" in line for line in found)  # twelve examples: the other decides
    assert any("scores higher on 100%, lower on 0%" in line and "P(better) = 100%" in line for line in found)
    assert any("Over 12 samples" in line and "PPO is 0.50 nats per completion from SFT" in line for line in found)
    assert make_report({"base": BAD, "sft": GOOD})[0].findings == []


def test_the_power_of_the_test_set_is_told_with_every_verdict():
    for p_value in (0.01, 0.5):
        power = first_findings(p_value=p_value)[0]
        assert "standard error is 0.31" in power and "2,000 examples see a difference of 0.87" in power
        assert "0.29 needs about 18,000 examples" in power  # a third of it: nine times as many
    assert "within ±1.51 by two one-sided tests" in verdict([comparison(p_value=0.5)], "bleu")
    assert "one-sided" not in verdict([comparison()], "bleu")
    # One example has no scatter, which says nothing about others.
    assert "one-sided" not in verdict([comparison(p_value=1.0, standard_error=0.0)], "bleu")


def test_the_tests_that_do_not_decide_are_told():
    agrees = "paired bootstrap; paired randomisation (p = 0.040) agrees"
    assert any(agrees in line for line in first_findings())
    close = first_findings(p_value=0.06, test=MCNEMAR)
    assert any("McNemar; paired bootstrap (p = 0.049) and paired" in line and "not agree" in line for line in close)


def test_no_adjective_for_the_effect():
    told = " ".join(first_findings())
    assert "P(better) = 60%" in told and not any(word in told for word in ("negligible", "small (", "medium", "d ="))


def test_only_a_control_with_shuffled_scores_shows_that_the_reward_earned_the_gain():
    texts = {"sft": BAD, "ppo": GOOD, "control": BAD}
    earned = make_report(texts, control_kind="shuffled scores")[0].findings
    assert any("shuffled scores moved bleu by +0.00" in line and "the reward earned" in line for line in earned)
    constant = make_report(texts, control_kind="a constant reward")[0].findings
    assert any("a constant reward moved bleu by" in line and "shuffle_scores" in line for line in constant)
    assert not any("earned" in line for line in constant)
    given = make_report({"sft": BAD, "ppo": GOOD, "control": GOOD}, control_kind="shuffled scores")[0]
    assert any("no gain is shown to be the reward's" in line for line in given.findings)
    assert given.warnings == []  # a control may well write what PPO writes
    assert not any("control" in line for line in make_report({"sft": BAD, "ppo": GOOD})[0].findings)


def test_each_baseline_is_compared_with_ppo_in_words():
    texts = {"sft": BAD, "ppo": GOOD, "sft_by_metric": BAD, "sft_longer": GOOD}
    report = make_report(texts)[0]
    (line,) = [line for line in report.findings if "sft_longer" in line]
    assert line.startswith("PPO is better than the SFT checkpoint that PPO's rule chooses (sft_by_metric: bleu +")
    assert "and not shown to differ from SFT for as long as SFT and PPO took together (sft_longer: bleu +0.00" in line
    pairs = {(c.a, c.b) for c in report.comparisons}
    assert pairs == {("sft", "ppo"), ("sft_by_metric", "ppo"), ("sft_longer", "ppo")}
    assert report.warnings == ["sft_longer and ppo wrote the same text for every prompt: are they the same model?"]
    worse = make_report({"sft": BAD, "ppo": BAD, "sft_longer": GOOD})[0].findings
    assert any("PPO is worse than SFT for as long" in line for line in worse)
    assert not any("PPO is" in line and "(sft_" in line for line in make_report({"sft": BAD, "ppo": GOOD})[0].findings)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (None, "the recipe does not say which data chose its hyper-parameters."),
        ("validation", "hyper-parameters were chosen on validation data."),
        ("test", "hyper-parameters were chosen on this test set, which makes p too small."),
        ("not tuned", "hyper-parameters were not tuned."),
    ],
)
def test_the_report_says_which_data_chose_checkpoints_and_hyperparameters(told, words):
    rules = {"sft": "eval_loss", "ppo": "eval_reward"}
    found = make_report({"sft": BAD, "ppo": GOOD}, checkpoints=rules, hyperparameters=told)[0].findings
    (line,) = [line for line in found if "hyper-parameters" in line]
    expected = "Checkpoints were chosen on the validation split: SFT's by eval_loss, PPO's by eval_reward; "
    assert line == expected + words
    last = make_report({"sft": BAD, "ppo": GOOD}, checkpoints={"ppo": None}, hyperparameters=told)[0].findings
    assert f"PPO ended with the last checkpoint; {words}" in last


def test_best_of_n_compares_samples_with_samples():
    """PPO's greedy answers are right and all samples of both are wrong: the samples are no merit of PPO's."""
    never = [text for text in BAD for _ in range(2)]
    told = make_report({"sft": MIXED, "ppo": GOOD}, samples={"sft": never, "ppo": never})[0].findings[-1]
    assert "one PPO sample is worth one SFT sample or more." in told
    assert "temperature 1," in told and "greedy: SFT 0." in told and "PPO 1.000" in told
    both = [text for good, bad in zip(GOOD, BAD, strict=True) for text in (bad, good)]
    told = make_report({"sft": BAD, "ppo": GOOD}, samples={"sft": never, "ppo": both})[0].findings[-1]
    assert "worth one SFT sample or more." in told  # all samples of SFT are as bad as one
    told = make_report({"sft": BAD, "ppo": GOOD}, samples={"sft": both, "ppo": never})[0].findings[-1]
    assert "worth less than one SFT sample." in told
    good = [text for text in GOOD for _ in range(2)]
    told = make_report({"sft": BAD, "ppo": GOOD}, samples={"sft": both, "ppo": good})[0].findings[-1]
    assert "worth the best of 2 of SFT or more." in told
    told = make_report({"sft": BAD, "ppo": GOOD}, samples={"sft": both, "ppo": both})[0].findings[-1]
    assert "worth one SFT sample or more, and less than the best of 2." in told


def test_no_warning_where_nothing_is_wrong():
    assert (
        make_report({"base": [""] * 12, "sft": MIXED, "ppo": GOOD})[0].warnings == []
    )  # an untrained base is no news


def test_bleu_of_short_references_is_warned_of(monkeypatch):
    monkeypatch.setattr(evaluation_toys, "TEST", replace(evaluation_toys.TEST, references=[["yes"]] * 12))
    (warning,) = make_report({"sft": MIXED, "ppo": GOOD})[0].warnings
    assert warning.startswith("bleu: 100% of the references are shorter than 4 words")


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


def test_drift_in_length():
    found = make_report({"sft": MIXED, "ppo": GOOD}, changes={"ppo": {"completion_ids": [1] * 40}})[0].warnings
    assert any(line.startswith("ppo writes 40.0 tokens where sft writes 8.0 ") for line in found)


@pytest.mark.parametrize(
    ("sample", "warning"),
    [
        (SampleMeasure(40, 80.0, 20.1), "ppo is far from SFT: 0.50 nats of KL per token"),  # of its samples, not texts
        (SampleMeasure(8, 0.1, 0.5), "ppo lost its entropy: 0.012 nats per token, sft 0.250"),
    ],
)
def test_drift_of_samples(sample, warning):
    found = make_report({"sft": MIXED, "ppo": GOOD}, measures={"ppo": sample})[0].warnings
    assert len(found) == 1 and found[0].startswith(warning)
    assert make_report({"sft": MIXED, "ppo": GOOD}, measures={"ppo": SampleMeasure(40, 9.9, 20.0)})[0].warnings == []


def test_collapse_repetition_and_lost_variety():
    one = ["the cat sat on the mat"] * 12
    found = make_report({"sft": GOOD, "ppo": one})[0].warnings
    assert any("ppo collapsed" in line and "100%" in line for line in found)
    assert any(line.startswith("ppo lost variety: distinct bigrams") for line in found)
    stuck = [f"{text} so it is so it is so it is" for text in GOOD]
    assert any(
        line.startswith("ppo repeats itself: ") for line in make_report({"sft": GOOD, "ppo": stuck})[0].warnings
    )
