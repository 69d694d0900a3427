"""Compare runs with each other, and summarise runs that differ only in their seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.evaluation.closed_forms import holm
from pipeline.evaluation.crossed import crossed_comparison
from pipeline.evaluation.power import equivalence_margin, p_text, signed_text, size_text, smallest_difference
from pipeline.evaluation.run_files import Run, RunComparison, compare_to_sft, read_rows, run_metrics
from pipeline.evaluation.seeds import (
    SeedSummary,
    controls_over_seeds,
    disagreements,
    resampled_rows,
    seeds_findings,
    seeds_verdict,
    summarise_seeds,
)
from pipeline.evaluation.significance import SIGNIFICANT, compare_texts

BY_SEED = ("seed", "eval.control")  # settings that differ between the seeds of one experiment


@dataclass(frozen=True)
class PairwiseComparison:
    """One system of a run compared with that of the first run on the same test set, by the metric that decides.

    Where both stand for several seeds (`seeds_a`, `seeds_b`), the means over the seeds are compared. `p_holm` is
    `p_value` corrected for all comparisons of the page; `degrees` are those of the standard error.
    """

    a: str
    b: str
    system: str
    metric: str
    delta: float
    low: float
    high: float
    p_value: float
    p_holm: float
    standard_error: float
    degrees: float
    seeds_a: int = 1
    seeds_b: int = 1


@dataclass(frozen=True)
class RunsReport:
    """What the comparison's report.json holds."""

    runs: list[str]
    verdict: str
    findings: list[str]
    warnings: list[str]
    gains: list[RunComparison]
    seeds: list[SeedSummary]
    duels: list[PairwiseComparison]


def compare_runs(runs: Sequence[Run]) -> RunsReport:
    """Compare runs, which need not have the same systems or settings."""
    groups, repeated = [], []
    for group in group_by_settings(runs):
        distinct, warnings = distinct_seeds(group)
        groups.append(distinct)
        repeated += warnings
    seeds = [summary for group in groups if len(group) > 1 for summary in summarise_seeds(group)]
    duels = compare_groups(groups) if len(groups) > 1 else [] if seeds else compare_checkpoints(runs[0], runs[1:])
    seeds, duels = correct_page(seeds, duels)
    about_seeds = len(groups) == 1 and bool(seeds)
    details = pairwise_findings(duels)
    if about_seeds:
        details = [*seeds_findings(seeds[0]), *controls_over_seeds(seeds, groups[0])]
    elif duels:
        details += untested(groups if len(groups) > 1 else [[run] for run in runs], duels)
    return RunsReport(
        runs=[run.name for run in runs],
        verdict=seeds_verdict(seeds[0]) if about_seeds else pairwise_verdict(duels),
        findings=details + [f"{run.name}: {run.report['verdict']}" for run in runs],
        warnings=repeated
        + disagreements(seeds)
        + [f"{run.name}: {text}" for run in runs for text in run.report["warnings"]],
        gains=[gain for run in runs for gain in compare_to_sft(run)],
        seeds=seeds,
        duels=duels,
    )


def group_by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that are one experiment with different seeds, in the order of the first of each."""
    groups: list[tuple[dict, list[Run]]] = []
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key not in BY_SEED}
        members = next((group for common, group in groups if common == settings), None)
        if members is None:
            groups.append((settings, [run]))
        else:
            members.append(run)
    return [group for _, group in groups]


def distinct_seeds(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keep one of the runs that repeat a seed or its texts, and say which were left out.

    PPO may end as the SFT model, so seeds whose PPO wrote what SFT wrote may agree in every text.
    """
    kept: list[tuple[Run, tuple[str, ...]]] = []
    warnings = []
    for run in runs:
        sft, ppo = (read_rows(run, system).texts for system in ("sft", "ppo"))
        same_seed = next((other for other, _ in kept if other.seed == run.seed), None)
        same_texts = next((other for other, texts in kept if ppo and ppo == texts and ppo != sft), None)
        if same_seed is not None:
            warnings.append(f"{run.name} has the seed of {same_seed.name} ({run.seed}): counted once")
        elif same_texts is not None:
            warnings.append(f"PPO of {run.name} wrote the same texts as that of {same_texts.name}: counted once")
        else:
            kept.append((run, ppo))
    return [run for run, _ in kept], warnings


def compare_groups(groups: Sequence[Sequence[Run]]) -> list[PairwiseComparison]:
    """Compare every group of seeds with the first: over seeds where both have several, else checkpoints."""
    first, duels = groups[0], []
    for group in groups[1:]:
        if len(first) > 1 and len(group) > 1:
            over_seeds = compare_over_seeds(first, group)
            duels += [] if over_seeds is None else [over_seeds]
        else:
            duels += compare_checkpoints(first[0], group)
    return duels


def compare_over_seeds(first: Sequence[Run], others: Sequence[Run]) -> PairwiseComparison | None:
    """Test the means of two groups of seeds against each other; None unless all share a test set and a metric."""
    shared = shared_system(first[0], others[0])
    metrics = run_metrics(first[0])
    if shared is None:
        return None
    system, metric = shared
    scored = resampled_rows(metrics[metric], [read_rows(run, system) for run in (*first, *others)])
    if scored is None:
        return None
    values, n_clusters = scored
    test = crossed_comparison(values[len(first) :], n_clusters, values[: len(first)])
    return PairwiseComparison(
        *(f"{group[0].name} ({len(group)} seeds)" for group in (first, others)),
        system,
        metric,
        test.delta,
        test.low,
        test.high,
        test.p_value,
        test.p_value,
        test.standard_error,
        test.degrees,
        len(first),
        len(others),
    )


def compare_checkpoints(first: Run, others: Sequence[Run]) -> list[PairwiseComparison]:
    """Test every other run's system against the first run's, where they share a test set, a system and the metric."""
    return [duel for other in others if (duel := compare_pair(first, other)) is not None]


def compare_pair(first: Run, other: Run) -> PairwiseComparison | None:
    """Test two runs against each other; None unless they share a test set, a system and the deciding metric."""
    shared = shared_system(first, other)
    if shared is None:
        return None
    system, metric = shared
    rows_a, rows_b = read_rows(first, system), read_rows(other, system)
    if not rows_a.keys or rows_a.keys != rows_b.keys:
        return None
    references = [list(texts) for _, texts in rows_a.keys]
    tests = compare_texts(run_metrics(first)[metric], rows_a.texts, rows_b.texts, references, clusters=rows_a.clusters)
    result = tests.bootstrap
    return PairwiseComparison(
        first.name,
        other.name,
        system,
        metric,
        result.delta,
        result.low,
        result.high,
        tests.p_value,
        tests.p_value,
        result.standard_error,
        max(rows_a.clusters.count - 1, 1),
    )


def shared_system(first: Run, other: Run) -> tuple[str, str] | None:
    """Name the system and the deciding metric that two runs share; None if they share none."""
    system = next((s for s in ("ppo", "sft") if s in first.report["systems"] and s in other.report["systems"]), None)
    configs = [run.report["settings"].get("metrics") for run in (first, other)]
    if system is None or not configs[0] or configs[0][0] != (configs[1] or [None])[0]:
        return None
    return system, next(iter(run_metrics(first)))


def correct_page(
    seeds: Sequence[SeedSummary], duels: Sequence[PairwiseComparison]
) -> tuple[list[SeedSummary], list[PairwiseComparison]]:
    """Correct the p-values of a page for the number of all its comparisons, by Holm's method."""
    corrected = holm([*(summary.deciding.p_value for summary in seeds), *(duel.p_value for duel in duels)])
    of_seeds, of_duels = corrected[: len(seeds)], corrected[len(seeds) :]
    return (
        [replace(summary, p_holm=p) for summary, p in zip(seeds, of_seeds, strict=True)],
        [replace(duel, p_holm=p) for duel, p in zip(duels, of_duels, strict=True)],
    )


def pairwise_verdict(duels: Sequence[PairwiseComparison]) -> str:
    """Say in one sentence how each run compares with the first."""
    if not duels:
        return "The runs share no test set, system and metric, so they are shown side by side without a test."
    return "; ".join(_pair_in_words(duel) for duel in duels) + "."


def untested(groups: Sequence[Sequence[Run]], duels: Sequence[PairwiseComparison]) -> list[str]:
    """Name the runs that could not be compared with the first one."""
    tested = {duel.b.removesuffix(f" ({duel.seeds_b} seeds)") for duel in duels}
    names = [run.name for group in groups[1:] for run in group[: 1 if group[0].name in tested else None]]
    missing = [name for name in names if name not in tested]
    if not missing:
        return []
    verb = "shares" if len(missing) == 1 else "share"
    return [f"Not tested: {', '.join(missing)}, which {verb} no test set, system and metric with {groups[0][0].name}."]


def _pair_in_words(duel: PairwiseComparison) -> str:
    delta = signed_text(duel.delta, duel.standard_error or abs(duel.delta))
    figures = f"{duel.system}, {duel.metric} {delta}, {p_text(duel.p_holm)}"
    differs = duel.p_holm < SIGNIFICANT
    if not differs and duel.standard_error:
        margin = equivalence_margin(duel.delta, duel.standard_error, duel.degrees)
        figures += f", within ±{size_text(margin)} by two one-sided tests"
    if min(duel.seeds_a, duel.seeds_b) > 1:
        return f"{duel.b} {'differs' if differs else 'is not shown to differ'} from {duel.a} ({figures})"
    verb = "differ" if differs else "are not shown to differ"
    return f"{duel.b} and {duel.a}: these two checkpoints {verb} ({figures})"


def pairwise_findings(duels: Sequence[PairwiseComparison]) -> list[str]:
    """Say how the p-values were corrected, what each comparison can see, and what single checkpoints leave open."""
    lines = []
    if any(duel.p_holm != duel.p_value for duel in duels):
        lines.append(f"p-values are corrected by Holm for all comparisons of this page, {len(duels)} between runs.")
    for duel in duels:
        smallest = smallest_difference(duel.standard_error, duel.degrees)
        lines.append(
            f"{duel.b} against {duel.a}: standard error {size_text(duel.standard_error)}; with 80 % power the test "
            f"sees a difference of {size_text(smallest)} or more."
        )
    if any(min(duel.seeds_a, duel.seeds_b) == 1 for duel in duels):
        lines.append("With one seed of a run, the test is about its checkpoint: another seed may turn out otherwise.")
    return lines
