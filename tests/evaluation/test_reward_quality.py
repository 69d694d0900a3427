"""The figures of a reward report against numbers worked out by hand."""

import math
from itertools import count

import numpy as np
import pytest

from pipeline.evaluation.reward_quality import (
    ScoredPair,
    ScoredText,
    consensus,
    correlations,
    evaluate_reward_model,
    reliability_table,
    trivial_rules,
)
from pipeline.metrics import load_metric

P = math.log(3)  # a difference of scores that predicts 75 %


PROMPTS = count()


def pair(
    chosen: float, rejected: float, lengths=(3, 5), prompt: int | None = None, ppo_answers: bool = False, **others
) -> ScoredPair:
    """A pair of scores; a prompt of its own unless told."""
    prompt = next(PROMPTS) if prompt is None else prompt
    return ScoredPair(prompt, chosen, rejected, *lengths, others, ppo_answers)


def test_rules_look_at_lengths_and_a_tie_counts_half():
    pairs = [pair(0, 0, (3, 5)), pair(0, 0, (4, 4)), pair(0, 0, (9, 5), other=(2.0, 1.0))]
    assert {rule.name: (rule.value, rule.count) for rule in trivial_rules(pairs)} == {
        "the shorter text wins": (0.5, 3),
        "the longer text wins": (0.5, 3),
        "other": (1.0, 1),
    }
    assert trivial_rules(pairs[:1])[0].value == 1.0


def test_reliability_compares_the_prediction_with_what_happened():
    table, error = reliability_table([pair(P, 0), pair(P, 0), pair(P, 0), pair(0, P), pair(1, 1)])
    assert [(bin_.low, bin_.count, bin_.observed) for bin_ in table] == [(0.5, 1, 0.5), (0.7, 4, 0.75)]
    assert [bin_.predicted for bin_ in table] == pytest.approx([0.5, 0.75])
    assert error == pytest.approx(0.0)
    _, error = reliability_table([pair(P, 0), pair(0, P)])
    assert error == pytest.approx(0.25)


def test_correlations_overall_and_within_prompts():
    # Across prompts the score follows the metric; within each it runs against it.
    values = [(0, 0.0, 1.0), (0, 1.0, 0.0), (1, 10.0, 11.0), (1, 11.0, 10.0)]
    texts = [ScoredText(prompt, score, 4, {"bleu": metric}) for prompt, score, metric in values]
    bleu, length = correlations(texts)
    a, b = np.array([v[1] for v in values]), np.array([v[2] for v in values])
    assert bleu.pearson == pytest.approx(np.corrcoef(a, b)[0, 1]) and bleu.pearson > 0.9
    assert bleu.spearman == pytest.approx(0.6)  # ranks 1 2 3 4 against 2 1 4 3
    assert bleu.within_prompt == pytest.approx(-1.0)
    assert (length.name, length.pearson, length.within_prompt) == ("length, tokens", None, None)


def test_consensus_scores_a_text_by_the_others_of_its_prompt():
    metric = load_metric("exact_match")
    found = consensus([(0, "a", "b"), (0, "a", "c"), (1, "x", "y")], metric)
    assert list(found[0].values()) == [(0.0, 0.0)] and "exact_match" in next(iter(found[0]))
    metric = load_metric("token_f1")
    # "red dog" shares one word of two with "red cat", none with "no": 0.25; "no" shares nothing.
    found = consensus([(0, "red dog", "no"), (0, "red dog", "red cat")], metric)
    assert list(found[0].values()) == [(0.25, 0.0)] and list(found[1].values()) == [(0.25, 0.25)]


def report(pairs, texts=(), **keys):
    texts = texts or [ScoredText(0, 0.0, 1, {}), ScoredText(0, 1.0, 2, {})]
    return evaluate_reward_model(pairs, [], texts, (0.0, 1.0), keys.get("min_accuracy", 0.55), {}, {})


def test_the_verdict_names_the_best_rule_and_a_refusal():
    good = report([pair(1, 0, (5, 3)) for _ in range(190)] + [pair(0, 1, (5, 3)) for _ in range(10)])
    assert "95.0% of 200 held-out pairs of 200 prompts [91.0%," in good.verdict
    assert "(the longer text wins) gets 100.0%" in good.verdict and "refuses" not in good.verdict
    assert any("trivial rule" in w and "the longer text wins in 100.0%" in w for w in good.warnings)
    bad = report([pair(1, 0), pair(0, 1)])
    assert "PPO refuses it: its interval begins below reward.min_accuracy, which is 55%" in bad.verdict
    assert len(bad.findings) == 2 and "not beat chance" in bad.findings[0]
    assert "only 2 pairs are held out" in bad.warnings[0]


def test_warnings_of_length_and_of_a_metric_that_it_runs_against():
    texts = [ScoredText(n % 3, float(n), 10 - n, {"bleu": -float(n)}) for n in range(9)]
    warnings = " ".join(report([pair(1, 0)] * 150, texts).warnings)
    assert "length bias: it prefers shorter" in warnings and "against bleu (r = -1.00)" in warnings


def test_noise_is_no_warning():
    texts = [ScoredText(n, float(n % 4), 5, {"bleu": -0.1 * (n % 4) + (n * 7 % 5)}) for n in range(40)]
    found = report([pair(1, 0)] * 150, texts)
    (related,) = [c for c in found.correlations if c.name == "bleu"]
    assert -2 / 40**0.5 < related.pearson < 0 and not any("against bleu" in text for text in found.warnings)


def test_pairs_of_one_prompt_are_one_cluster_and_the_gate_looks_where_the_interval_begins():
    single = report([pair(1, 0) for _ in range(150)] + [pair(0, 1) for _ in range(50)])
    assert single.accuracy.low > 0.55 and "PPO refuses" not in single.verdict
    # The same pairs, 25 of a prompt, each prompt all right or all wrong: eight cases, and not two hundred.
    right = [pair(1, 0, prompt=n // 25) for n in range(150)]
    alike = report(right + [pair(0, 1, prompt=6 + n // 25) for n in range(50)])
    assert (alike.accuracy.value, alike.accuracy.count, alike.accuracy.clusters) == (0.75, 200, 8)
    assert alike.accuracy.low < 0.45 and "PPO refuses it: its interval begins below" in alike.verdict
    assert "It does not beat chance" in alike.findings[0]
    swapped = report([pair(0, 1) for _ in range(150)] + [pair(1, 0) for _ in range(50)])
    assert swapped.accuracy.high < 0.5 and "worse than chance" in swapped.findings[0]


def test_accuracy_on_prompts_that_ppo_answers_and_on_fresh_ones():
    held_out = [pair(1, 0), pair(1, 0), pair(1, 0), pair(0, 1), pair(1, 0, ppo_answers=True)]
    training = [pair(1, 0, ppo_answers=True), pair(1, 0, ppo_answers=True), pair(0, 1, ppo_answers=True), pair(0, 1)]
    texts = [ScoredText(0, 0.0, 1, {}), ScoredText(0, 1.0, 2, {})]
    found = evaluate_reward_model(held_out, training, texts, (0.0, 1.0), 0.55, {}, {})
    assert (found.accuracy.count, found.training_accuracy.count) == (5, 4)
    assert (found.fresh_accuracy.value, found.fresh_accuracy.count) == (0.75, 4)
    assert (found.ppo_accuracy.value, found.ppo_accuracy.count) == (0.75, 4)
    assert "75.0% of 4 pairs, of which it was trained on 3; on fresh prompts in 75.0% of 4" in found.findings[-1]
    assert "None of the pairs has a prompt that PPO answers" in report([pair(1, 0)]).findings[-1]
