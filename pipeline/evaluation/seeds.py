"""Runs that differ in their seed alone: what they show together about PPO and SFT."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from pipeline.evaluation.config import BASELINES, CONTROL
from pipeline.evaluation.controls import Effect, baselines_finding, control_finding
from pipeline.evaluation.crossed import CrossedComparison, crossed_comparison, seeds_alone
from pipeline.evaluation.power import (
    equivalence_margin,
    equivalence_text,
    p_text,
    signed_text,
    size_text,
    smallest_difference,
)
from pipeline.evaluation.report import REWARD
from pipeline.evaluation.run_files import Run, RunComparison, ScoredRows, read_comparisons, read_rows, run_metrics
from pipeline.evaluation.significance import SIGNIFICANT
from pipeline.metrics import Metric
from pipeline.metrics.resampling import bootstrap_indices, resampled_means

N_RESAMPLES = 1000
OTHER_PAIRS = (("sft", CONTROL), *((name, "ppo") for name in (CONTROL, *BASELINES)))


@dataclass(frozen=True)
class SeedSummary:
    """System `b` - system `a` by one measure over runs that differ in their seed alone.

    `deltas` are the differences of the seeds; `deviation` is their sample standard deviation, `low` and `high` are
    the extremes, `ahead` is the share of seeds in which `b` has the better score. `over_both` tests the mean over
    seeds and examples, `over_seeds` over seeds alone; the first is None where the seeds have other test sets, or texts
    or scores are missing, and the second decides. `p_holm` is the deciding p corrected for all of the page.
    `sft_models` counts the SFT models; 0 where the texts do not tell.
    """

    a: str
    b: str
    metric: str
    runs: list[str]
    seeds: list
    deltas: list[float]
    mean: float
    deviation: float
    low: float
    high: float
    ahead: float
    sft_models: int
    over_both: CrossedComparison | None
    over_seeds: CrossedComparison
    p_holm: float
    higher_is_better: bool

    @property
    def deciding(self) -> CrossedComparison:
        """Return the test that decides."""
        return self.over_both or self.over_seeds

    @property
    def gain(self) -> float:
        """Return the mean with its sign chosen so that it is positive where `b` is better."""
        return self.deciding.delta if self.higher_is_better else -self.deciding.delta


def summarise_seeds(runs: Sequence[Run]) -> list[SeedSummary]:
    """Summarise runs of several seeds: PPO - SFT by each measure, then other pairs of systems by the first."""
    summaries = summarise_pair(runs, "sft", "ppo")
    for a, b in OTHER_PAIRS if summaries else ():
        summaries += summarise_pair(runs, a, b, summaries[0].metric)
    return summaries


def summarise_pair(runs: Sequence[Run], a: str, b: str, only: str | None = None) -> list[SeedSummary]:
    """Summarise b - a by each measure that all runs have, in the order of the report, or by one measure alone."""
    gains = [gain for run in runs for gain in read_comparisons(run, a, b)]
    rows = [[read_rows(run, system) for system in (a, b)] for run in runs]
    sft_models, metrics = count_sft_models(runs), run_metrics(runs[0])
    summaries = []
    for metric in dict.fromkeys(gain.metric for gain in gains if only in (None, gain.metric)):
        group = [gain for gain in gains if gain.metric == metric]
        if len(group) == len(runs):
            has_scores = metric == REWARD or metric in metrics
            over_both = over_seeds_and_examples(metrics.get(metric), rows) if has_scores else None
            summaries.append(_summary(metric, group, sft_models, over_both))
    return summaries


def count_sft_models(runs: Sequence[Run]) -> int:
    """Count the SFT models of the runs by their records, or by their texts where a record does not name one.

    0 where texts are missing or of other prompts. Models that wrote the same may have been trained anew all the same.
    """
    models = [_sft_model(run) for run in runs]
    if None not in models:
        return len(set(models))
    rows = [read_rows(run, "sft") for run in runs]
    if not rows[0].keys or any(row.keys != rows[0].keys for row in rows):
        return 0
    return len({row.texts for row in rows})


def _sft_model(run: Run) -> str | None:
    """Return the state of a run's SFT model in its record, or the path of one from outside; None without both."""
    path = run.settings.get("ppo.sft_model_path")
    return run.inputs.get("sft") if path is None else run.inputs.get(str(Path(path).expanduser()), path)


def _summary(
    metric: str, group: Sequence[RunComparison], sft_models: int, over_both: CrossedComparison | None
) -> SeedSummary:
    deltas = [gain.delta for gain in group]
    return SeedSummary(
        a=group[0].a,
        b=group[0].b,
        metric=metric,
        runs=[gain.run for gain in group],
        seeds=[gain.seed for gain in group],
        deltas=deltas,
        mean=fmean(deltas),
        deviation=stdev(deltas),
        low=min(deltas),
        high=max(deltas),
        ahead=fmean(gain.better for gain in group),
        sft_models=sft_models,
        over_both=over_both,
        over_seeds=seeds_alone(deltas),
        p_holm=1.0,
        higher_is_better=group[0].higher_is_better,
    )


def over_seeds_and_examples(metric: Metric | None, rows: Sequence[Sequence[ScoredRows]]) -> CrossedComparison | None:
    """Test the mean difference of pairs of systems over their seeds and examples; `rows` has a pair for each seed.

    By the reward where `metric` is None. None where the seeds have other test sets, or no rewards.
    """
    scored = resampled_rows(metric, [system for pair in rows for system in pair])
    if scored is None:
        return None
    values, n_clusters = scored
    return crossed_comparison(values[1::2] - values[::2], n_clusters)


def resampled_rows(metric: Metric | None, systems: Sequence[ScoredRows]) -> tuple[np.ndarray, int] | None:
    """Score systems on the same resamples, [systems, R + 1], and count the clusters; see `over_seeds_and_examples`."""
    keys = systems[0].keys
    if not keys or any(system.keys != keys for system in systems):
        return None
    clusters = systems[0].clusters
    indices = clusters.rows_with_full_set(bootstrap_indices(clusters.count, N_RESAMPLES, 0))
    if metric is not None:
        references = [list(texts) for _, texts in keys]
        return np.array([metric.resampled_scores(s.texts, references, indices) for s in systems]), clusters.count
    if any(None in system.scores for system in systems):
        return None
    return np.array([resampled_means(system.scores, indices) for system in systems]), clusters.count


def seeds_verdict(summary: SeedSummary) -> str:
    """Say in one sentence what the seeds show together."""
    count, test = len(summary.seeds), summary.deciding
    scale = test.standard_error or abs(test.delta)
    delta, low, high = (signed_text(value, scale) for value in (test.delta, test.low, test.high))
    by_seed = ", ".join(signed_text(value, scale) for value in summary.deltas)
    figures = (
        f"{summary.metric} {delta} on average over {count} seeds (95 % interval {low} to {high}, "
        f"{p_text(test.p_value)}; by seed {by_seed})"
    )
    if test.p_value < SIGNIFICANT:
        better = (test.delta > 0) == summary.higher_is_better
        return f"PPO is {'better' if better else 'worse'} than SFT: {figures}."
    margin = equivalence_margin(test.delta, test.standard_error, test.degrees)
    return f"No difference between PPO and SFT is shown: {figures}.{equivalence_text(margin, test.standard_error)}"


def seeds_findings(summary: SeedSummary) -> list[str]:
    """Say how the seeds were tested, what the test can see, and whether SFT was trained anew with each seed."""
    count, test, alone = len(summary.seeds), summary.deciding, summary.over_seeds
    smallest = smallest_difference(test.standard_error, test.degrees)
    power = (
        f"standard error {size_text(test.standard_error)}: with 80 % power it sees a difference of "
        f"{size_text(smallest)} or more"
    )
    low, high = (signed_text(value, alone.standard_error) for value in (alone.low, alone.high))
    interval = f"{low} to {high} ({p_text(alone.p_value)})"
    if summary.over_both is None:
        why = "The seeds have different test sets, or texts or scores of some are missing"
        tested = f"{why}, so Student's t over the seeds decides; {power}."
    else:
        tested = f"The test is a crossed bootstrap over seeds and test examples; {power}."
    beside = f"Student's t over the {count} seeds alone, blind to the choice of examples: {interval}."
    if summary.sft_models == 0:
        reseeded = ""
    elif summary.sft_models == 1:
        reseeded = "All seeds start from one SFT model: the spread is that of PPO, not of the whole chain."
    elif summary.sft_models == count:
        reseeded = "SFT was trained anew with each seed: the spread is that of the whole chain."
    else:
        reseeded = f"The {count} seeds share {summary.sft_models} SFT models: the spread is partly that of SFT."
    lines = [tested, beside if summary.over_both is not None else "", reseeded]
    return [line for line in lines if line]


def controls_over_seeds(seeds: Sequence[SeedSummary], runs: Sequence[Run]) -> list[str]:
    """Say over the seeds what the findings of one run say of control and baselines."""
    kinds = [run.report["settings"].get("control_kind") for run in runs]
    effects = {
        (s.a, s.b): Effect(s.metric, s.deciding.delta, s.gain, s.p_holm, s.deciding.standard_error)
        for s in reversed(seeds)
    }
    alone, beyond = effects.get(("sft", CONTROL)), effects.get((CONTROL, "ppo"))
    kind = kinds[0] if len(set(kinds)) == 1 else "different rewards"
    lines = [control_finding(alone, beyond, kind, _share_a_control(runs))] if alone and beyond else []
    lines.append(baselines_finding({a: effects[a, "ppo"] for a in BASELINES if (a, "ppo") in effects}))
    return [f"Over the {len(kinds)} seeds: {line}" for line in lines if line]


def _share_a_control(runs: Sequence[Run]) -> bool:
    """Tell whether one control stands in several runs, by their records, or else because all its texts repeat.

    Texts that are those of SFT tell nothing.
    """
    controls = [run.inputs.get(CONTROL) for run in runs]
    if None not in controls:
        return len(set(controls)) < len(controls)
    texts = [read_rows(run, CONTROL).texts for run in runs]
    moved = [own for own, run in zip(texts, runs, strict=True) if own and own != read_rows(run, "sft").texts]
    return len(set(moved)) < len(moved)


def disagreements(seeds: Sequence[SeedSummary]) -> list[str]:
    """List the measures by which PPO is better than SFT with some seeds and worse with others."""
    return [
        f"seeds disagree on {s.metric}: PPO is ahead of SFT in {s.ahead:.0%} of them "
        f"({signed_text(s.low, s.deviation)} to {signed_text(s.high, s.deviation)})"
        for s in seeds
        if s.low < 0 < s.high and s.a == "sft" and s.b == "ppo"
    ]
