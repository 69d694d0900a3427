"""The quality of a reward model: held-out accuracy, calibration, correlations, length bias, trivial rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt

import numpy as np

from pipeline.evaluation.proportions import Share, share, wins
from pipeline.metrics import Metric

BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Where a finding becomes a warning.
FEW_PAIRS, LENGTH_BIAS, CALIBRATION_ERROR = 100, 0.5, 0.1


@dataclass(frozen=True)
class ScoredPair:
    """A pair with its raw scores, its prompt's number, and what trivial rules compare.

    These are the lengths in characters, and in `others` by rule name a value of either text, of which the larger wins.
    `ppo_answers` says that the prompt is one of those that PPO answers.
    """

    prompt: int
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int
    others: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ppo_answers: bool = False


@dataclass(frozen=True)
class ScoredText:
    """A held-out text: its prompt's number, its raw score, its length in tokens, its sentence scores by metric."""

    prompt: int
    score: float
    length: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Reliability:
    """Pairs whose preferred text wins with a predicted probability in [low, high): how sure, and how often right."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Correlation:
    """Correlation of the score with `name` over held-out texts: Pearson's r, Spearman's rho, and r within the prompts.

    Within the prompts: after subtracting each prompt's mean, which leaves what tells completions of one prompt apart.
    None where nothing varies.
    """

    name: str
    pearson: float | None
    spearman: float | None
    within_prompt: float | None
    count: int


@dataclass(frozen=True)
class RewardReport:
    """What is known of a reward model; `score = (raw - shift) / scale`.

    `accuracy` is that on held-out pairs which did not choose its checkpoint; pairs of one prompt are a cluster of its
    interval. `ppo_accuracy` is that on pairs, trained on or not, whose prompts PPO answers, `fresh_accuracy` that on
    held-out pairs of other prompts; None without such pairs.
    """

    verdict: str
    warnings: list[str]
    findings: list[str]
    accuracy: Share
    training_accuracy: Share | None
    ppo_accuracy: Share | None
    fresh_accuracy: Share | None
    rules: list[Share]
    reliability: list[Reliability]
    calibration_error: float
    correlations: list[Correlation]
    shift: float
    scale: float
    pairs: dict[str, object]
    settings: dict[str, object]


def accuracy(pairs: Sequence[ScoredPair], name: str = "reward model") -> Share:
    """Compute how often the chosen text scores higher."""
    return share(name, wins([(p.chosen_score, p.rejected_score) for p in pairs]), [p.prompt for p in pairs])


def _accuracy_of_any(pairs: Sequence[ScoredPair], name: str) -> Share | None:
    return accuracy(pairs, name) if pairs else None


def trivial_rules(pairs: Sequence[ScoredPair]) -> list[Share]:
    """Compute how often rules without any learning are right on the same pairs."""
    rules: dict[str, Callable[[ScoredPair], tuple[float, float]]] = {
        "the shorter text wins": lambda p: (-p.chosen_length, -p.rejected_length),
        "the longer text wins": lambda p: (p.chosen_length, p.rejected_length),
    }
    shares = [share(name, wins([rule(p) for p in pairs]), [p.prompt for p in pairs]) for name, rule in rules.items()]
    for name in dict.fromkeys(name for p in pairs for name in p.others):
        compared = [p for p in pairs if name in p.others]
        shares.append(share(name, wins([p.others[name] for p in compared]), [p.prompt for p in compared]))
    return shares


def consensus(pairs: Sequence[tuple[int, str, str]], metric: Metric) -> list[dict[str, tuple[float, float]]]:
    """Compute for each pair (prompt, chosen, rejected) how well either text agrees with the prompt's other texts.

    The agreement is the text's mean sentence score with each of the others as its reference, the pair's other text
    included.
    """
    texts: dict[int, dict[str, None]] = {}
    for prompt, *both in pairs:
        texts.setdefault(prompt, {}).update(dict.fromkeys(both))
    wanted = [(p, text, other) for p, every in texts.items() for text in every for other in every if other != text]
    agreements = metric.sample_scores([text for _, text, _ in wanted], [[other] for *_, other in wanted])
    values: dict[tuple[int, str], list[float]] = {}
    for (prompt, text, _), score in zip(wanted, agreements, strict=True):
        values.setdefault((prompt, text), []).append(score)
    name = f"higher {metric.name} to the other texts of the prompt"
    means = {key: float(np.mean(scores)) for key, scores in values.items()}
    return [{name: (means[prompt, chosen], means[prompt, rejected])} for prompt, chosen, rejected in pairs]


def reliability_table(pairs: Sequence[ScoredPair]) -> tuple[list[Reliability], float]:
    """Compare predicted with observed frequencies of the preferred text being the chosen one.

    Also returns the expected calibration error.

    The prediction is that of the loss, Bradley and Terry's sigmoid of the difference of raw scores.
    """
    differences = np.array([p.chosen_score - p.rejected_score for p in pairs])
    predicted = 1 / (1 + np.exp(-np.abs(differences)))
    right = np.where(differences == 0, 0.5, differences > 0)
    table, error = [], 0.0
    for low, high in pairwise(BINS):
        inside = (predicted >= low) & ((predicted < high) | (high == BINS[-1]))
        if inside.any():
            means = float(predicted[inside].mean()), float(right[inside].mean())
            table.append(Reliability(low, high, int(inside.sum()), *means))
            error += inside.mean() * abs(means[0] - means[1])
    return table, float(error)


def correlations(texts: Sequence[ScoredText]) -> list[Correlation]:
    """Correlate the score with each metric and with the length in tokens."""
    rows = []
    for name in dict.fromkeys(name for text in texts for name in text.metrics):
        scored = [text for text in texts if name in text.metrics]
        rows.append(_correlation(name, scored, [text.metrics[name] for text in scored]))
    return [*rows, _correlation("length, tokens", texts, [float(text.length) for text in texts])]


def _correlation(name: str, texts: Sequence[ScoredText], values: Sequence[float]) -> Correlation:
    scores, values = np.array([text.score for text in texts]), np.array(values)
    prompts = [text.prompt for text in texts]
    return Correlation(
        name,
        pearson(scores, values),
        pearson(_ranks(scores), _ranks(values)),
        pearson(centred(scores, prompts), centred(values, prompts)),
        len(texts),
    )


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Compute Pearson's r of two arrays [N]; None where one does not vary."""
    if len(a) < 2 or np.ptp(a) < 1e-12 or np.ptp(b) < 1e-12:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank the values [N]; equal values share their mean rank."""
    distinct, index, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[index] if len(distinct) else values


def centred(values: np.ndarray, prompts: Sequence[int]) -> np.ndarray:
    """Subtract from the values [N] the mean of their prompt."""
    _, index = np.unique(np.array(prompts), return_inverse=True)
    means = np.bincount(index, values) / np.bincount(index)
    return values - means[index]


def evaluate_reward_model(
    held_out: Sequence[ScoredPair],
    training: Sequence[ScoredPair],
    texts: Sequence[ScoredText],
    calibration: tuple[float, float],
    min_accuracy: float,
    pairs: dict[str, object],
    settings: dict[str, object],
) -> RewardReport:
    """Compute the report on a reward model from its scores of held-out pairs and texts."""
    right, rules = accuracy(held_out), trivial_rules(held_out)
    table, error = reliability_table(held_out)
    related = correlations(texts)
    answered = [pair for pair in (*held_out, *training) if pair.ppo_answers]
    ppo = _accuracy_of_any(answered, "reward model, prompts that PPO answers")
    fresh = _accuracy_of_any([p for p in held_out if not p.ppo_answers], "reward model, fresh prompts")
    return RewardReport(
        verdict=_verdict(right, rules, min_accuracy),
        warnings=_warnings(right, rules, error, related),
        findings=[*_findings(right, rules), *_on_prompts(ppo, fresh, sum(pair.ppo_answers for pair in training))],
        accuracy=right,
        training_accuracy=_accuracy_of_any(training, "reward model, training pairs"),
        ppo_accuracy=ppo,
        fresh_accuracy=fresh,
        rules=rules,
        reliability=table,
        calibration_error=error,
        correlations=related,
        shift=calibration[0],
        scale=calibration[1],
        pairs=pairs,
        settings=settings,
    )


def _verdict(right: Share, rules: Sequence[Share], min_accuracy: float) -> str:
    best = max(rules, key=lambda rule: rule.value)
    sentence = f"The reward model prefers the better text in {right.value:.1%} of {right.count} held-out pairs"
    sentence += f" of {right.clusters} prompts"
    interval = f"[{right.low:.1%}, {right.high:.1%}]"
    refusal = f" PPO refuses it: its interval begins below reward.min_accuracy, which is {min_accuracy:.0%}."
    allowed = "" if right.low >= min_accuracy else refusal
    return f"{sentence} {interval}; the best trivial rule ({best.name}) gets {best.value:.1%}.{allowed}"


def _findings(right: Share, rules: Sequence[Share]) -> list[str]:
    beaten = [rule.name for rule in rules if right.low > rule.value]
    if right.low > 0.5 and len(beaten) == len(rules):
        return ["It beats chance and every trivial rule: its interval is above all of them."]
    if right.high < 0.5:
        return ["It is worse than chance: chosen and rejected, or the sign of its scores, look swapped."]
    return [] if right.low > 0.5 else ["It does not beat chance: 50 % is within its interval."]


def _on_prompts(ppo: Share | None, fresh: Share | None, trained: int) -> list[str]:
    """Say how the model does on prompts that PPO answers, many of which it was trained on, and on fresh ones."""
    if ppo is None:
        return ["None of the pairs has a prompt that PPO answers, so its accuracy there is not known."]
    on_trained = f"{ppo.value:.1%} of {ppo.count} pairs, of which it was trained on {trained}"
    on_fresh = "there are no held-out pairs of fresh prompts"
    if fresh is not None:
        on_fresh = f"on fresh prompts in {fresh.value:.1%} of {fresh.count} [{fresh.low:.1%}, {fresh.high:.1%}]"
    return [f"On prompts that PPO answers it is right in {on_trained}; {on_fresh}."]


def _warnings(right: Share, rules: Sequence[Share], error: float, related: Sequence[Correlation]) -> list[str]:
    warnings = []
    if right.count < FEW_PAIRS:
        warnings.append(f"only {right.count} pairs are held out, so every figure here is rough")
    for rule in rules:
        if rule.value >= right.value:
            warnings.append(f"a trivial rule does as well or better: {rule.name} in {rule.value:.1%} of the pairs")
    if error > CALIBRATION_ERROR:
        warnings.append(f"its probabilities are off by {error:.1%} on average (a margin in the loss makes it surer)")
    for correlation in related:
        within = correlation.pearson if correlation.within_prompt is None else correlation.within_prompt
        if correlation.name.startswith("length") and within is not None and abs(within) > LENGTH_BIAS:
            kind = "longer" if within > 0 else "shorter"
            warnings.append(f"length bias: it prefers {kind} completions of a prompt (r = {within:+.2f})")
        elif not correlation.name.startswith("length") and within is not None and within < -_noise(correlation):
            warnings.append(f"within a prompt its scores run against {correlation.name} (r = {within:+.2f})")
    return warnings


def _noise(correlation: Correlation) -> float:
    """Return two standard errors of an r of 0."""
    return 2 / sqrt(max(1, correlation.count))
