"""How a learned reward ranks the systems' own samples: by hand, and the warning where it ranks those of PPO worse."""

import numpy as np
import pytest
from evaluation_toys import prediction

from pipeline.evaluation.agreement import agreement_findings, agreement_warnings, reward_agreement
from pipeline.evaluation.decodings import DecodedText
from pipeline.evaluation.scoring import ScoredPrediction, ScoredSystem


def system(*samples: tuple[int, float, float]) -> ScoredSystem:
    """A system with samples of (prompt, reward, metric)."""
    drawn = [
        ScoredPrediction(DecodedText(prompt, "a", [1]), reward, {"learned": reward}, {"bleu": metric})
        for prompt, reward, metric in samples
    ]
    return ScoredSystem([ScoredPrediction(prediction())], samples=drawn)


def agree(**systems: ScoredSystem):
    return reward_agreement(systems, "learned", "bleu")


def test_pairs_by_hand():
    """Prompt 0: three pairs, two ranked alike; prompt 1: a pair with equal rewards, half; prompt 2: equal metrics."""
    first, second = [(0, 1.0, 0.1), (0, 2.0, 0.3), (0, 3.0, 0.2)], [(1, 5.0, 0.1), (1, 5.0, 0.9)]
    found = agree(sft=system(*first, *second, (2, 1.0, 0.5), (2, 2.0, 0.5)))["sft"]
    assert (found.accuracy.value, found.accuracy.count, found.accuracy.clusters) == (2.5 / 4, 4, 2)
    assert (found.change, found.low, found.high) == (None, None, None)
    rewards, metrics = [-1, 0, 1, 0, 0, -0.5, 0.5], [-0.1, 0.1, 0, -0.4, 0.4, 0, 0]
    assert found.within_prompt == pytest.approx(np.corrcoef(rewards, metrics)[0, 1])


def test_the_words_fit_metrics_that_count_errors():
    scores = [(0, 0.0, 0.1), (0, 1.0, 0.9)]  # sentence scores: more is better, whatever the metric counts
    (line,) = agreement_findings(agree(sft=system(*scores), ppo=system(*scores)))
    assert "prefers the one that is better by bleu in 100.0% of the pairs" in line


def test_a_reward_that_does_not_apply_is_left_out():
    found = agree(sft=system((0, float("nan"), 0.1), (0, 1.0, 0.2), (0, 2.0, 0.3)))["sft"]
    assert (found.accuracy.value, found.accuracy.count) == (1.0, 1)
    assert agree(sft=system((0, float("nan"), 0.1), (0, 1.0, 0.2))) == {} and agree(sft=system()) == {}
    assert reward_agreement({"sft": system((0, 1.0, 0.2), (0, 2.0, 0.3))}, "other", "bleu") == {}


def ranked(right: list[int]) -> ScoredSystem:
    """For each prompt four samples; of their six pairs the reward ranks 6, 4 or 0 right."""
    rewards = {6: (0.0, 1.0, 2.0, 3.0), 4: (0.0, 3.0, 1.0, 2.0), 0: (3.0, 2.0, 1.0, 0.0)}
    return system(
        *((p, reward, float(m)) for p, number in enumerate(right) for m, reward in enumerate(rewards[number]))
    )


def test_the_change_has_an_interval_over_prompts():
    """SFT right in 6, 6, 6 and 4 of 6 pairs, PPO in 0, 6, 4 and 4: changes of -6, 0, -2 and 0 of 6."""
    found = agree(sft=ranked([6, 6, 6, 4]), ppo=ranked([0, 6, 4, 4]))
    changes = np.array([-6, 0, -2, 0]) / 6
    assert found["ppo"].change == pytest.approx(changes.mean())
    reach = 3.18245 * changes.std(ddof=1) / 2
    expected = (changes.mean() - reach, changes.mean() + reach)
    assert (found["ppo"].low, found["ppo"].high) == pytest.approx(expected, abs=1e-5)
    assert "in 91.7% of the pairs that SFT wrote and in 58.3%" in agreement_findings(found)[0]
    assert agreement_warnings(found) == []  # four prompts decide nothing


def test_a_reward_whose_mistakes_were_learnt_is_warned_of():
    warning = agreement_warnings(agree(sft=ranked([6] * 18 + [4] * 2), ppo=ranked([4] * 12 + [0] * 8)))
    assert len(warning) == 1 and "agrees with bleu less on PPO's samples" in warning[0] and "40.0%" in warning[0]
    risen = agree(sft=ranked([4] * 20), ppo=ranked([6] * 20))
    assert agreement_warnings(risen) == [] and "+33.3 points" in agreement_findings(risen)[0]
    assert agreement_findings(agree(sft=ranked([6]))) == []
