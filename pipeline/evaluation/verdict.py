"""The report in words: what improved, by how much, how sure that is, and what looks wrong."""

from collections.abc import Mapping, Sequence

from pipeline.evaluation.config import CONTROL
from pipeline.evaluation.decodings import BestOfN
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.report import REWARD, System, SystemComparison
from pipeline.evaluation.text_statistics import TextStatistics

SIGNIFICANT = 0.05
FAR_FROM_SFT = 0.5  # nats of KL per token
LENGTH_CHANGE = 0.25  # of SFT's length
COLLAPSED = 0.7  # of SFT's distinct bigrams
REPEATS = 0.1  # more repeated trigrams than SFT, as a share
SAME_TEXT = 0.2  # of all prompts answered by one text, beyond what the references do
LOST_ENTROPY = 0.25  # of SFT's entropy


def verdict(comparisons: Sequence[SystemComparison], metric: str) -> str:
    """Say in one sentence whether PPO beat SFT on the first metric."""
    comparison = _find(comparisons, "sft", "ppo", metric)
    if comparison is None:
        return "SFT and PPO were not both evaluated, so there is nothing to compare."
    interval = f"95 % interval {comparison.low:+.2f} to {comparison.high:+.2f}"
    figures = f"{metric} {comparison.delta:+.2f} ({interval}, p = {_p(comparison)})"
    if comparison.p_value >= SIGNIFICANT:
        return f"No evidence that PPO changed the quality of SFT: {figures}."
    return f"PPO is {'better' if comparison.gain > 0 else 'worse'} than SFT: {figures}."


def findings(
    comparisons: Sequence[SystemComparison],
    systems: Mapping[str, System],
    best_of: Mapping[str, BestOfN],
    metric: str,
) -> list[str]:
    """Explain the verdict, a sentence each: other metrics, effect, the control, distance from SFT, best of n."""
    comparison = _find(comparisons, "sft", "ppo", metric)
    if comparison is None:
        return []
    lines = [_other_metrics(comparisons, metric), _agreement(comparison), _effect(comparison), _control(comparisons)]
    lines += [_distance(systems), _best_of(best_of)]
    return [line for line in lines if line]


def _find(comparisons: Sequence[SystemComparison], a: str, b: str, metric: str) -> SystemComparison | None:
    return next((c for c in comparisons if (c.a, c.b, c.metric) == (a, b, metric)), None)


def _p(comparison: SystemComparison) -> str:
    return f"{comparison.p_value:.3f}"


def _first_metric(comparisons: Sequence[SystemComparison], a: str, b: str) -> SystemComparison | None:
    return next((c for c in comparisons if (c.a, c.b) == (a, b)), None)


def _other_metrics(comparisons: Sequence[SystemComparison], metric: str) -> str:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "without evidence": []}
    for c in comparisons:
        if (c.a, c.b) != ("sft", "ppo") or c.metric == metric:
            continue
        group = "without evidence" if c.p_holm >= SIGNIFICANT else "better" if c.gain > 0 else "worse"
        groups[group].append(f"{c.metric} {c.delta:+.3f} (p = {c.p_holm:.3f})")
    phrases = [f"{name}: {', '.join(items)}" for name, items in groups.items() if items]
    return f"By the other measures, p corrected by Holm, {'; '.join(phrases)}." if phrases else ""


def _agreement(comparison: SystemComparison) -> str:
    agree = (comparison.p_value < SIGNIFICANT) == (comparison.p_randomisation < SIGNIFICANT)
    word = "agrees" if agree else "does not agree, so the case is close"
    return f"Paired approximate randomisation {word} (p = {comparison.p_randomisation:.3f})."


def _effect(comparison: SystemComparison) -> str:
    same = 1 - comparison.wins - comparison.losses
    shares = f"higher on {comparison.wins:.0%}, lower on {comparison.losses:.0%} and the same on {same:.0%}"
    if comparison.effect_size is None:
        return f"Sentence by sentence PPO scores {shares}, everywhere by the same amount."
    size = abs(comparison.effect_size)
    word = "negligible" if size < 0.1 else "small" if size < 0.35 else "medium" if size < 0.65 else "large"
    return f"Sentence by sentence PPO scores {shares}; the effect is {word} (d = {comparison.effect_size:+.2f})."


def _control(comparisons: Sequence[SystemComparison]) -> str:
    alone, beyond = _first_metric(comparisons, "sft", CONTROL), _first_metric(comparisons, CONTROL, "ppo")
    if alone is None or beyond is None:
        return ""
    change = f"{alone.metric} by {alone.delta:+.2f} (p = {_p(alone)})"
    moved = f"The constant-reward control moved {change} without any signal"
    if beyond.p_value < SIGNIFICANT and beyond.gain > 0:
        return f"{moved}; PPO is better than it by {beyond.delta:+.2f} (p = {_p(beyond)}), which the reward explains."
    return (
        f"{moved}; PPO is not better than it ({beyond.delta:+.2f}, p = {_p(beyond)}), so the reward explains no gain."
    )


def _distance(systems: Mapping[str, System]) -> str:
    sft, ppo = systems["sft"], systems["ppo"]
    if ppo.kl_to_sft is None:
        return ""
    return (
        f"PPO is {ppo.kl_to_sft:.2f} nats per completion from SFT ({ppo.kl_to_sft / ppo.length:.3f} per token), its "
        f"entropy went from {sft.entropy:.2f} to {ppo.entropy:.2f} nats per token and its length from "
        f"{sft.length:.1f} to {ppo.length:.1f} tokens."
    )


def _best_of(best_of: Mapping[str, BestOfN]) -> str:
    if "sft" not in best_of or "ppo" not in best_of:
        return ""
    sft, ppo = best_of["sft"], best_of["ppo"]
    name = REWARD if REWARD in sft.curves else next(iter(sft.curves))
    curve, target = sft.curves[name], ppo.decoded[name]
    enough = next((k for k, value in enumerate(curve, start=1) if value >= target), None)
    measured = f"on {sft.prompts} prompts at temperature {sft.temperature:g}"
    if enough is None:
        best = f"the best of {len(curve)} SFT samples ({curve[-1]:.3f}) does not reach PPO's {target:.3f}"
    else:
        samples = "1 SFT sample" if enough == 1 else f"the best of {enough} SFT samples"
        best = f"{samples} ({curve[enough - 1]:.3f}) would do for PPO's {target:.3f}"
    return f"Chosen by knowing the {name}, {best}, {measured}."


def find_warnings(
    predictions: Mapping[str, Sequence[Prediction]],
    comparisons: Sequence[SystemComparison],
    systems: Mapping[str, System],
    references: TextStatistics,
    rewards: Sequence[str],
) -> list[str]:
    """List what a reader of the scores should be warned of; `rewards` are the names of PPO's rewards."""
    warnings = _identical(predictions, comparisons, systems) + _reward_hacking(comparisons, rewards)
    for name, items in predictions.items():
        if name == "base":  # an untrained base is expected to write little
            continue
        empty = sum(not item.completion for item in items)
        if empty:
            warnings.append(f"{name} wrote nothing for {empty} of {len(items)} prompts")
        unfinished = sum(not item.finished for item in items) / len(items)
        if unfinished > 0.1:
            warnings.append(f"{name} did not end {unfinished:.0%} of its completions within the length limit")
        excess = systems[name].texts.most_common - references.most_common
        if excess > SAME_TEXT:
            share = systems[name].texts.most_common
            warnings.append(f"{name} collapsed: it answers {share:.0%} of the prompts with one and the same text")
    if "sft" in systems:
        for name in systems:
            if name not in ("base", "sft"):
                warnings += _drift(name, systems[name], systems["sft"])
    return warnings


def _identical(
    predictions: Mapping[str, Sequence[Prediction]],
    comparisons: Sequence[SystemComparison],
    systems: Mapping[str, System],
) -> list[str]:
    warnings = []
    for a, b in dict.fromkeys((c.a, c.b) for c in comparisons):
        if CONTROL in (a, b):  # a constant reward may well leave everything as it is; the findings say so
            continue
        if a == "sft" and systems[b].same_weights_as_sft:
            warnings.append(f"sft and {b} have identical weights: training changed nothing, and nothing is compared")
        elif all(x.completion_ids == y.completion_ids for x, y in zip(predictions[a], predictions[b], strict=True)):
            warnings.append(f"{a} and {b} wrote the same text for every prompt: are they the same model?")
    return warnings


def _reward_hacking(comparisons: Sequence[SystemComparison], rewards: Sequence[str]) -> list[str]:
    """Warn where the reward rose while a metric that is no reward fell, both beyond chance."""
    reward = _find(comparisons, "sft", "ppo", REWARD)
    if reward is None or reward.gain <= 0 or reward.p_holm >= SIGNIFICANT:
        return []
    fell = [
        f"{c.metric} {c.delta:+.2f} (p = {c.p_holm:.3f})"
        for c in comparisons
        if (c.a, c.b) == ("sft", "ppo") and c.metric not in (REWARD, *rewards)
        if c.gain < 0 and c.p_holm < SIGNIFICANT
    ]
    if not fell:
        return []
    return [f"reward rose by {reward.delta:+.4f} while metrics that are no rewards got worse: {', '.join(fell)}"]


def _drift(name: str, system: System, sft: System) -> list[str]:
    warnings = []
    per_token = (system.kl_to_sft or 0.0) / system.length
    if per_token > FAR_FROM_SFT:
        warnings.append(f"{name} is far from SFT: {per_token:.2f} nats of KL per token")
    if abs(system.length / sft.length - 1) > LENGTH_CHANGE:
        warnings.append(
            f"{name} writes {system.length:.1f} tokens where sft writes {sft.length:.1f} "
            f"({system.texts.length_ratio:.2f} words for each word of the references)"
        )
    if system.texts.repetition - sft.texts.repetition > REPEATS:
        warnings.append(
            f"{name} repeats itself: {system.texts.repetition:.0%} of its trigrams, sft {sft.texts.repetition:.0%}"
        )
    if system.texts.distinct_2 < COLLAPSED * sft.texts.distinct_2:
        warnings.append(
            f"{name} lost variety: distinct bigrams {system.texts.distinct_2:.3f}, sft {sft.texts.distinct_2:.3f}"
        )
    if system.entropy < LOST_ENTROPY * sft.entropy:
        warnings.append(
            f"{name} lost its entropy: {system.entropy:.3f} nats per token, sft {sft.entropy:.3f}; "
            "its samples will hardly differ"
        )
    return warnings
