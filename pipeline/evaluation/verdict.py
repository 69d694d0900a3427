"""The report in words: what improved, by how much, how sure that is, and what looks wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.evaluation.clusters import sizes_text
from pipeline.evaluation.config import BASELINES, CONTROL, MIN_BOOTSTRAP
from pipeline.evaluation.controls import Effect, baselines_finding, choices_finding, control_finding
from pipeline.evaluation.decodings import BestOfN
from pipeline.evaluation.power import equivalence_text, p_text, signed_text, size_text
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.report import REWARD, System, SystemComparison
from pipeline.evaluation.significance import BOOTSTRAP, RANDOMISATION, SIGNIFICANT
from pipeline.evaluation.text_statistics import TextStatistics

FAR_FROM_SFT = 0.5  # nats of KL per token
LENGTH_CHANGE = 0.25  # of SFT's length
COLLAPSED = 0.7  # of SFT's distinct bigrams
REPEATS = 0.1  # more repeated trigrams than SFT, as a share
SAME_TEXT = 0.2  # of all prompts answered by one text, beyond what the references do
LOST_ENTROPY = 0.25  # of SFT's entropy


def verdict(comparisons: Sequence[SystemComparison], metric: str, n_resamples: int = MIN_BOOTSTRAP) -> str:
    """Say whether PPO beat SFT on the first metric, and where that is open, how large the difference can be.

    With too few resamples no p-value can be small, so there is no verdict.
    """
    if n_resamples < MIN_BOOTSTRAP:
        return f"No verdict: eval.n_bootstrap is {n_resamples}, and p-values need at least {MIN_BOOTSTRAP} resamples."
    comparison = _find(comparisons, "sft", "ppo", metric)
    if comparison is not None:
        return _verdict_on(comparison, "SFT", "PPO")
    asked = [c for c in comparisons if c.metric == metric]
    others = [c for c in asked if "sft" not in (c.a, c.b)] or asked
    if not others:
        return "SFT and PPO were not both evaluated, so there is nothing to compare."
    if len(others) > 1:  # none of them was the question from the start
        others = [replace(c, p_value=c.p_holm) for c in others]
    return " ".join(_verdict_on(c, c.a, c.b) for c in others)


def _verdict_on(comparison: SystemComparison, a: str, b: str) -> str:
    scale = comparison.standard_error or abs(comparison.delta)
    delta, low, high = (signed_text(x, scale) for x in (comparison.delta, comparison.low, comparison.high))
    figures = f"{comparison.metric} {delta} (95 % interval {low} to {high}, {p_text(comparison.p_value)})"
    if comparison.p_value >= SIGNIFICANT:
        open_range = equivalence_text(comparison.equivalence_margin, comparison.standard_error)
        return f"No difference between {b} and {a} is shown: {figures}.{open_range}"
    return f"{b} is {'better' if comparison.gain > 0 else 'worse'} than {a}: {figures}."


def findings(
    comparisons: Sequence[SystemComparison],
    systems: Mapping[str, System],
    best_of: Mapping[str, BestOfN],
    metric: str,
    settings: Mapping[str, object],
) -> list[str]:
    """Explain the verdict, a line each: power, other metrics, tests, shares, controls, choices, distance, best of n.

    Of the run's `settings` those are read that say what the control is and what chose the models.
    """
    comparison = _find(comparisons, "sft", "ppo", metric)
    if comparison is None:
        return []
    lines = [_power(comparison), _other_metrics(comparisons, metric), _agreement(comparison), _shares(comparison)]
    lines += [_control(comparisons, settings.get("control_kind")), _baselines(comparisons)]
    lines += [choices_finding(settings.get("checkpoints") or {}, settings.get("hyperparameters"))]
    lines += [_distance(systems), _best_of(best_of)]
    return [line for line in lines if line]


def _find(comparisons: Sequence[SystemComparison], a: str, b: str, metric: str) -> SystemComparison | None:
    return next((c for c in comparisons if (c.a, c.b, c.metric) == (a, b, metric)), None)


def _first_metric(comparisons: Sequence[SystemComparison], a: str, b: str) -> SystemComparison | None:
    return next((c for c in comparisons if (c.a, c.b) == (a, b)), None)


def _other_metrics(comparisons: Sequence[SystemComparison], metric: str) -> str:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not shown to differ": []}
    for c in comparisons:
        if (c.a, c.b) != ("sft", "ppo") or c.metric == metric:
            continue
        group = "not shown to differ" if c.p_holm >= SIGNIFICANT else "better" if c.gain > 0 else "worse"
        groups[group].append(f"{c.metric} {c.delta:+.3f} ({p_text(c.p_holm)})")
    phrases = [f"{name}: {', '.join(items)}" for name, items in groups.items() if items]
    return (
        f"By the other measures, p corrected by Holm for all comparisons of the run, {'; '.join(phrases)}."
        if phrases
        else ""
    )


def _power(comparison: SystemComparison) -> str:
    """Say what the test set can see; a difference k times as small needs k squared times as many examples."""
    smallest = comparison.smallest_difference
    if smallest == 0:
        return ""
    more = float(f"{9 * comparison.clusters:.2g}")
    unit = "examples" if comparison.clusters == comparison.examples else "clusters"
    return (
        f"The standard error is {size_text(comparison.standard_error)}: with 80 % power, "
        f"{sizes_text(comparison.examples, comparison.clusters)} see a difference of {size_text(smallest)} or more; "
        f"one of {size_text(smallest / 3)} needs about {more:,.0f} {unit}."
    )


def _agreement(comparison: SystemComparison) -> str:
    others = {BOOTSTRAP: comparison.p_bootstrap, RANDOMISATION: comparison.p_randomisation}
    others.pop(comparison.test, None)
    tests = " and ".join(f"{name} ({p_text(p)})" for name, p in others.items())
    agree = all((p < SIGNIFICANT) == (comparison.p_value < SIGNIFICANT) for p in others.values())
    verb, negated = ("agrees", "does not") if len(others) == 1 else ("agree", "do not")
    word = verb if agree else f"{negated} agree, so the case is close"
    return f"The p-value is from {comparison.test}; {tests} {word}."


def _shares(comparison: SystemComparison) -> str:
    same = max(0.0, 1 - comparison.wins - comparison.losses)
    better, worse = ("scores higher", "lower") if comparison.higher_is_better else ("is better", "worse")
    return (
        f"Example by example PPO {better} on {comparison.wins:.0%}, {worse} on {comparison.losses:.0%} and the "
        f"same on {same:.0%}: P(better) = {comparison.p_better:.0%}, ties counted half."
    )


def _control(comparisons: Sequence[SystemComparison], kind: object) -> str:
    alone, beyond = _first_metric(comparisons, "sft", CONTROL), _first_metric(comparisons, CONTROL, "ppo")
    if alone is None or beyond is None:
        return ""
    return control_finding(_effect(alone), _effect(beyond), kind)


def _baselines(comparisons: Sequence[SystemComparison]) -> str:
    first = {name: _first_metric(comparisons, name, "ppo") for name in BASELINES}
    return baselines_finding({name: _effect(c) for name, c in first.items() if c is not None})


def _effect(comparison: SystemComparison) -> Effect:
    return Effect(comparison.metric, comparison.delta, comparison.gain, comparison.p_holm, comparison.standard_error)


def _distance(systems: Mapping[str, System]) -> str:
    sft, ppo = systems["sft"], systems["ppo"]
    if ppo.kl_to_sft is None:
        return ""
    error = "" if ppo.kl_to_sft_error is None else f"standard error {size_text(ppo.kl_to_sft_error)}, "
    return (
        f"Over {ppo.samples:,} samples at PPO's temperature, PPO is {ppo.kl_to_sft:.2f} nats per completion from SFT "
        f"({error}{ppo.kl_per_token:.3f} per token), and its entropy went from {sft.entropy:.2f} to "
        f"{ppo.entropy:.2f} nats per token. The completions went from {sft.length:.1f} to {ppo.length:.1f} tokens."
    )


def _best_of(best_of: Mapping[str, BestOfN]) -> str:
    """Compare samples with samples: the best of n of both systems at one temperature, and how both decode."""
    if "sft" not in best_of or "ppo" not in best_of:
        return ""
    sft, ppo = best_of["sft"], best_of["ppo"]
    name = REWARD if REWARD in sft.curves else next(iter(sft.curves))
    before, after = sft.curves[name], ppo.curves[name]
    reached = sum(value <= after[0] for value in before)  # the best of more is never worse
    if reached == 0:
        worth = "one PPO sample is worth less than one SFT sample"
    else:
        least = before.index(before[reached - 1]) + 1
        worth = f"one PPO sample is worth {'one SFT sample' if least == 1 else f'the best of {least} of SFT'} or more"
        worth += f", and less than the best of {reached + 1}" if reached < len(before) else ""
    return (
        f"Samples of {sft.prompts} prompts at temperature {sft.temperature:g}, the best chosen by knowing the {name}: "
        f"SFT {before[0]:.3f} with 1 and {before[-1]:.3f} with {len(before)}, PPO {after[0]:.3f} and {after[-1]:.3f}; "
        f"{worth}. The same prompts, {sft.decoding}: SFT {sft.decoded[name]:.3f}, PPO {ppo.decoded[name]:.3f}."
    )


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
            if name not in ("base", "sft", *BASELINES):
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
            reason = "training changed nothing, or no step was better than its start"
            warnings.append(f"sft and {b} have identical weights: {reason}, and nothing is compared")
        elif all(x.completion_ids == y.completion_ids for x, y in zip(predictions[a], predictions[b], strict=True)):
            warnings.append(f"{a} and {b} wrote the same text for every prompt: are they the same model?")
    return warnings


def _reward_hacking(comparisons: Sequence[SystemComparison], rewards: Sequence[str]) -> list[str]:
    """Warn where the reward rose while a metric that is no reward fell, both beyond chance."""
    reward = _find(comparisons, "sft", "ppo", REWARD)
    if reward is None or reward.gain <= 0 or reward.p_holm >= SIGNIFICANT:
        return []
    fell = [
        f"{c.metric} {signed_text(c.delta, c.standard_error)} ({p_text(c.p_holm)})"
        for c in comparisons
        if (c.a, c.b) == ("sft", "ppo") and c.metric not in (REWARD, *rewards)
        if c.gain < 0 and c.p_holm < SIGNIFICANT
    ]
    if not fell:
        return []
    return [f"reward rose by {reward.delta:+.4f} while metrics that are no rewards got worse: {', '.join(fell)}"]


def _drift(name: str, system: System, sft: System) -> list[str]:
    warnings = []
    if system.kl_per_token > FAR_FROM_SFT:
        warnings.append(f"{name} is far from SFT: {system.kl_per_token:.2f} nats of KL per token")
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
