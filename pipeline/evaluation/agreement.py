"""Whether a learned reward still ranks texts as a metric does, on samples of the policy that it has trained.

A reward model learns from samples of the SFT model. The policy moves to where the model scores high, and may end where
the model is wrong: Gao et al., Scaling Laws for Reward Model Overoptimization (2023). So the samples of both systems
are ranked again, by the reward and by the metric.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.evaluation.power import student_interval
from pipeline.evaluation.proportions import Share, share, wins
from pipeline.evaluation.reward_quality import centred, pearson
from pipeline.evaluation.scoring import ScoredPrediction, ScoredSystem
from pipeline.evaluation.significance import CONFIDENCE


@dataclass(frozen=True)
class RewardAgreement:
    """How a learned reward ranks samples of one system, compared with `metric`.

    `accuracy` is the share of pairs of samples of one prompt that the reward ranks as the metric does, where the
    metric tells them apart; prompts are its clusters. `within_prompt` is Pearson's r after subtracting each prompt's
    means. `change` is the accuracy minus that on samples of SFT, `low` and `high` its 95 % interval over prompts; None
    for SFT itself.
    """

    reward: str
    metric: str
    accuracy: Share
    within_prompt: float | None
    change: float | None = None
    low: float | None = None
    high: float | None = None


def reward_agreement(systems: Mapping[str, ScoredSystem], reward: str, metric: str) -> dict[str, RewardAgreement]:
    """Compare how the reward and the metric rank every system's samples; empty without samples or without `reward`."""
    ranked = {name: _ranked_pairs(system.samples, reward, metric) for name, system in systems.items()}
    agreements = {}
    for name, pairs in ranked.items():
        if not pairs:
            continue
        prompts, right = [prompt for prompt, _ in pairs], [win for _, win in pairs]
        change = _change(ranked["sft"], pairs) if name != "sft" and ranked.get("sft") else (None, None, None)
        related = _within_prompt(systems[name].samples, reward, metric)
        agreements[name] = RewardAgreement(reward, metric, share(name, right, prompts), related, *change)
    return agreements


def _ranked_pairs(samples: Sequence[ScoredPrediction], reward: str, metric: str) -> list[tuple[int, float]]:
    """List the prompt and the win of each pair of samples that the metric tells apart."""
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for sample in _comparable(samples, reward, metric):
        by_prompt.setdefault(sample.text.index, []).append((sample.metrics[metric], sample.rewards[reward]))
    pairs = []
    for prompt, values in by_prompt.items():
        better = [sorted(pair, reverse=True) for pair in combinations(values, 2) if pair[0][0] != pair[1][0]]
        pairs += [(prompt, win) for win in wins([(first[1], second[1]) for first, second in better])]
    return pairs


def _comparable(samples: Sequence[ScoredPrediction], reward: str, metric: str) -> list[ScoredPrediction]:
    return [s for s in samples if metric in s.metrics and math.isfinite(s.rewards.get(reward, math.nan))]


def _within_prompt(samples: Sequence[ScoredPrediction], reward: str, metric: str) -> float | None:
    compared = _comparable(samples, reward, metric)
    prompts = [s.text.index for s in compared]
    values = (np.array([s.rewards[reward] for s in compared]), np.array([s.metrics[metric] for s in compared]))
    return pearson(*(centred(column, prompts) for column in values))


def _change(
    before: Sequence[tuple[int, float]], after: Sequence[tuple[int, float]]
) -> tuple[float, float | None, float | None]:
    """Subtract the accuracy of `before` from that of `after`, with the interval of the jackknife over prompts."""
    prompts = sorted({prompt for pairs in (before, after) for prompt, _ in pairs})
    number = {prompt: i for i, prompt in enumerate(prompts)}
    totals = np.zeros((4, len(prompts)))  # wins and pairs of both
    for row, pairs in ((0, before), (2, after)):
        for prompt, win in pairs:
            totals[row : row + 2, number[prompt]] += win, 1.0
    sums = totals.sum(axis=1)
    change = float(sums[2] / sums[3] - sums[0] / sums[1])
    without = sums[:, None] - totals
    if len(prompts) < 2 or (without[1] == 0).any() or (without[3] == 0).any():
        return change, None, None
    changes = without[2] / without[3] - without[0] / without[1]
    error = float(np.sqrt((len(prompts) - 1) * np.mean((changes - changes.mean()) ** 2)))
    return change, *student_interval(change, error, len(prompts) - 1, CONFIDENCE)


def agreement_findings(agreements: Mapping[str, RewardAgreement]) -> list[str]:
    """Say in a sentence how the reward ranks the samples of SFT and of PPO."""
    sft, ppo = agreements.get("sft"), agreements.get("ppo")
    if sft is None or ppo is None:
        return []
    interval = "" if ppo.low is None else f", 95 % interval {100 * ppo.low:+.1f} to {100 * ppo.high:+.1f}"
    return [
        f"Of two samples of a prompt, the reward {ppo.reward} prefers the one that is better by {ppo.metric} in "
        f"{sft.accuracy.value:.1%} of the pairs that SFT wrote and in {ppo.accuracy.value:.1%} of those that PPO "
        f"wrote ({100 * ppo.change:+.1f} points{interval}; {ppo.accuracy.count} pairs of {ppo.accuracy.clusters} "
        "prompts)."
    ]


def agreement_warnings(agreements: Mapping[str, RewardAgreement]) -> list[str]:
    """Warn where the reward ranks PPO's samples worse than those of SFT, beyond chance."""
    ppo = agreements.get("ppo")
    if ppo is None or ppo.high is None or ppo.high >= 0:
        return []
    return [
        f"the reward {ppo.reward} agrees with {ppo.metric} less on PPO's samples than on those of SFT: "
        f"{ppo.accuracy.value:.1%} of the pairs, {100 * ppo.change:+.1f} points; PPO may have learnt its mistakes"
    ]
