"""Compare runs with each other, and summarise runs that differ only in their seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from pipeline.evaluation.significance import paired_bootstrap
from pipeline.metrics import load_metric

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, report.json, and the flat settings its evaluation was made with."""

    path: Path
    report: dict
    settings: dict

    @property
    def name(self) -> str:
        """Return the directory's name."""
        return self.path.name

    @property
    def first_metric(self) -> str:
        """Return the metric that decides."""
        return next(iter(next(iter(self.report["systems"].values()))["metrics"]))


@dataclass(frozen=True)
class RunComparison:
    """PPO compared with SFT in one run by one measure; `improved` is None without evidence (p of 0.05 or more)."""

    run: str
    seed: object
    metric: str
    delta: float
    p_value: float
    better: bool
    improved: bool | None


@dataclass(frozen=True)
class SeedSummary:
    """PPO - SFT by one measure over runs that differ in their seed alone.

    `mean`, `deviation` (of a sample, between seeds), `low` and `high` (the extremes) of the difference; the shares of
    seeds in which PPO is ahead at all, better with evidence and worse with evidence.
    """

    metric: str
    seeds: list
    mean: float
    deviation: float
    low: float
    high: float
    ahead: float
    improved: float
    worsened: float


@dataclass(frozen=True)
class PairwiseComparison:
    """One system of a run compared with that of the first run on the same test set, by the metric that decides."""

    a: str
    b: str
    system: str
    metric: str
    delta: float
    low: float
    high: float
    p_value: float


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


def load_run(path: Path) -> Run:
    """Read a run directory whose eval stage is finished.

    Raises:
        ValueError: there is no report in it, or one that is not whole.
    """
    file = path / "eval" / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        settings = json.loads((path / "eval" / "stage.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} holds no finished evaluation ({file} and stage.json next to it); "
            "run its eval stage first, and give the run's directory, such as runs/quickstart"
        ) from error
    return Run(path, report, settings)


def compare_runs(runs: Sequence[Run]) -> RunsReport:
    """Compare runs, which need not have the same systems or settings."""
    gains = [gain for run in runs for gain in compare_to_sft(run)]
    seeds = summarise_seeds(gains) if differ_in_seed_alone(runs) else []
    duels = [duel for other in runs[1:] if (duel := compare_pair(runs[0], other)) is not None]
    findings = [f"{run.name}: {run.report['verdict']}" for run in runs]
    return RunsReport(
        runs=[run.name for run in runs],
        verdict=seeds_verdict(seeds[0]) if seeds else pairwise_verdict(duels),
        findings=findings,
        warnings=disagreements(seeds) + [f"{run.name}: {text}" for run in runs for text in run.report["warnings"]],
        gains=gains,
        seeds=seeds,
        duels=duels,
    )


def compare_to_sft(run: Run) -> list[RunComparison]:
    """Read how PPO compares with SFT in one run, by each measure."""
    gains = []
    for c in run.report["comparisons"]:
        if (c["a"], c["b"]) != ("sft", "ppo"):
            continue
        better = (c["delta"] > 0) if c.get("higher_is_better", True) else (c["delta"] < 0)
        improved = better if c["p_value"] < SIGNIFICANT else None
        seed = run.report["settings"].get("seed")
        gains.append(RunComparison(run.name, seed, c["metric"], c["delta"], c["p_value"], better, improved))
    return gains


def differ_in_seed_alone(runs: Sequence[Run]) -> bool:
    """Tell whether the runs are one experiment with different seeds."""
    seeds = [run.settings.get("seed") for run in runs]
    rest = [{key: value for key, value in run.settings.items() if key != "seed"} for run in runs]
    return len(runs) > 1 and len(set(seeds)) == len(seeds) and all(settings == rest[0] for settings in rest)


def summarise_seeds(gains: Sequence[RunComparison]) -> list[SeedSummary]:
    """Summarise PPO - SFT over the seeds by each measure, in the order of the report."""
    summaries = []
    for metric in dict.fromkeys(gain.metric for gain in gains):
        group = [gain for gain in gains if gain.metric == metric]
        deltas = [gain.delta for gain in group]
        summaries.append(
            SeedSummary(
                metric=metric,
                seeds=[gain.seed for gain in group],
                mean=fmean(deltas),
                deviation=stdev(deltas) if len(deltas) > 1 else 0.0,
                low=min(deltas),
                high=max(deltas),
                ahead=fmean(gain.better for gain in group),
                improved=fmean(gain.improved is True for gain in group),
                worsened=fmean(gain.improved is False for gain in group),
            )
        )
    return summaries


def seeds_verdict(summary: SeedSummary) -> str:
    """Say in one sentence what the seeds show together."""
    count = len(summary.seeds)
    figures = (
        f"{summary.metric} {summary.mean:+.2f} on average (standard deviation {summary.deviation:.2f}, from "
        f"{summary.low:+.2f} to {summary.high:+.2f})"
    )
    if summary.improved == 1:
        return f"PPO is better than SFT in all {count} seeds: {figures}."
    if summary.worsened == 1:
        return f"PPO is worse than SFT in all {count} seeds: {figures}."
    better, worse = round(summary.improved * count), round(summary.worsened * count)
    return f"No agreement of {count} seeds that PPO changed SFT: better in {better}, worse in {worse}; {figures}."


def disagreements(seeds: Sequence[SeedSummary]) -> list[str]:
    """List the measures by which PPO is better than SFT with some seeds and worse with others."""
    return [
        f"seeds disagree on {s.metric}: PPO is ahead of SFT in {s.ahead:.0%} of them ({s.low:+.2f} to {s.high:+.2f})"
        for s in seeds
        if 0 < s.ahead < 1
    ]


def compare_pair(first: Run, other: Run) -> PairwiseComparison | None:
    """Test two runs against each other; None unless they share a test set, a system and the deciding metric."""
    system = next((s for s in ("ppo", "sft") if s in first.report["systems"] and s in other.report["systems"]), None)
    configs = [run.report["settings"].get("metrics") for run in (first, other)]
    if system is None or not configs[0] or configs[0][0] != (configs[1] or [None])[0]:
        return None
    rows_a, rows_b = (read_predictions(run, system) for run in (first, other))
    keys = [[(row["prompt"], row["references"]) for row in rows] for rows in (rows_a, rows_b)]
    if not rows_a or keys[0] != keys[1]:
        return None
    language, config = first.report["settings"].get("language"), configs[0][0]
    metric = load_metric(config["name"], language, **config["options"])
    texts = ([row["completion"] for row in rows] for rows in (rows_a, rows_b))
    result = paired_bootstrap(metric, *texts, [row["references"] for row in rows_a])
    return PairwiseComparison(
        first.name, other.name, system, metric.name, result.delta, result.low, result.high, result.p_value
    )


def read_predictions(run: Run, system: str) -> list[dict]:
    """Read a system's predictions; an empty list without the file."""
    file = run.path / "eval" / run.report["systems"][system]["predictions"]
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pairwise_verdict(duels: Sequence[PairwiseComparison]) -> str:
    """Say in one sentence how each run compares with the first."""
    if not duels:
        return "The runs share no test set, system and metric, so they are shown side by side without a test."
    sentences = []
    for d in duels:
        word = "differs from" if d.p_value < SIGNIFICANT else "shows no evidence of a difference from"
        sentences.append(f"{d.b} {word} {d.a} ({d.system}, {d.metric} {d.delta:+.2f}, p = {d.p_value:.3f})")
    return "; ".join(sentences) + "."
