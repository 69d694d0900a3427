"""The evaluation's result: scores of every system, comparisons between them, and the files that hold them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.evaluation.predictions import Prediction, cross_entropy
from pipeline.evaluation.significance import paired_bootstrap, paired_bootstrap_means
from pipeline.metrics import Metric, Score

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class System:
    """One system's figures on the test split.

    `mean_reward` and `cumulative_reward` are the mean and the sum of the weighted reward over the test completions,
    None without a `ppo:` section; `rewards` the mean of each part, None where it never applied. `cross_entropy`
    (nats per token) and `perplexity` are those of the references. `kl_to_sft` is in nats per completion, `length` in
    tokens, EOS included.
    """

    metrics: dict[str, Score]
    mean_reward: float | None
    cumulative_reward: float | None
    rewards: dict[str, float | None]
    cross_entropy: float
    perplexity: float
    kl_to_sft: float | None
    length: float
    finished: float
    predictions: str


@dataclass(frozen=True)
class SystemComparison:
    """System `b` against system `a`: `delta` = b - a, its interval, and a paired bootstrap's two-sided p-value."""

    a: str
    b: str
    metric: str
    delta: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class EvaluationReport:
    """What report.json holds."""

    systems: dict[str, System]
    comparisons: list[SystemComparison]
    verdict: str
    warnings: list[str]
    settings: dict[str, object]


def score_system(
    predictions: Sequence[Prediction],
    references: Sequence[Sequence[str]],
    metrics: Sequence[Metric],
    scores: Sequence[float],
    rewards: Mapping[str, Sequence[float]],
    file: str,
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> System:
    """All figures of one system; `scores` and `rewards` are its rewards per completion, empty without rewards."""
    texts = [prediction.completion for prediction in predictions]
    nats, perplexity = cross_entropy(predictions)
    divergence = [p.kl_to_sft for p in predictions if p.kl_to_sft is not None]
    applicable = {name: [value for value in values if value == value] for name, values in rewards.items()}
    return System(
        metrics={m.name: m.corpus_score(texts, references, n_bootstrap, confidence, seed) for m in metrics},
        mean_reward=_mean(scores) if scores else None,
        cumulative_reward=float(sum(scores)) if scores else None,
        rewards={name: _mean(found) if found else None for name, found in applicable.items()},
        cross_entropy=nats,
        perplexity=perplexity,
        kl_to_sft=_mean(divergence) if divergence else None,
        length=_mean([len(prediction.completion_ids) for prediction in predictions]),
        finished=_mean([float(prediction.finished) for prediction in predictions]),
        predictions=file,
    )


def compare_systems(
    a: str,
    b: str,
    predictions: Mapping[str, Sequence[Prediction]],
    references: Sequence[Sequence[str]],
    metrics: Sequence[Metric],
    scores: Mapping[str, Sequence[float]],
    n_bootstrap: int,
    seed: int,
) -> list[SystemComparison]:
    """`b` against `a` on every metric and on the reward."""
    texts_a, texts_b = ([p.completion for p in predictions[name]] for name in (a, b))
    results = []
    for metric in metrics:
        c = paired_bootstrap(metric, texts_a, texts_b, references, n_bootstrap, seed)
        results.append(SystemComparison(a, b, metric.name, c.delta, c.low, c.high, c.p_value))
    if scores.get(a) and scores.get(b):
        c = paired_bootstrap_means(scores[a], scores[b], n_bootstrap, seed)
        results.append(SystemComparison(a, b, "reward", c.delta, c.low, c.high, c.p_value))
    return results


def verdict(comparisons: Sequence[SystemComparison], metric: Metric) -> str:
    """One sentence: did PPO beat SFT on the first metric?"""
    found = [c for c in comparisons if (c.a, c.b, c.metric) == ("sft", "ppo", metric.name)]
    if not found:
        return "SFT and PPO were not both evaluated, so there is nothing to compare."
    c = found[0]
    gain = c.delta if metric.higher_is_better else -c.delta
    figures = f"{metric.name} {c.delta:+.2f} (95 % interval {c.low:+.2f} to {c.high:+.2f}, p = {c.p_value:.3f})"
    if c.p_value >= SIGNIFICANT:
        return f"No evidence that PPO changed the quality of SFT: {figures}."
    return f"PPO is {'better' if gain > 0 else 'worse'} than SFT: {figures}."


def find_warnings(
    predictions: Mapping[str, Sequence[Prediction]], comparisons: Sequence[SystemComparison]
) -> list[str]:
    """What a reader of the scores should know."""
    warnings = []
    for a, b in sorted({(c.a, c.b) for c in comparisons}):
        if all(x.completion_ids == y.completion_ids for x, y in zip(predictions[a], predictions[b], strict=True)):
            warnings.append(f"{a} and {b} wrote the same text for every prompt: are they the same model?")
    for name, items in predictions.items():
        empty = sum(not item.completion for item in items)
        if empty and name != "base":
            warnings.append(f"{name} wrote nothing for {empty} of {len(items)} prompts")
        unfinished = sum(not item.finished for item in items) / len(items)
        if unfinished > 0.1 and name != "base":
            warnings.append(f"{name} did not end {unfinished:.0%} of its completions within the length limit")
    return warnings


def write_report(report: EvaluationReport, samples: Sequence[Mapping[str, str]], directory: Path) -> None:
    """report.json for machines and report.md for people; `samples` are rows of column -> text."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    (directory / "report.json").write_text(text, encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(report, samples), encoding="utf-8")


def to_markdown(report: EvaluationReport, samples: Sequence[Mapping[str, str]]) -> str:
    """The report as tables."""
    header, rows = score_rows(report)
    parts = ["# Evaluation", report.verdict, *[f"**Warning:** {text}" for text in report.warnings]]
    parts += ["## Scores", _table(header, rows)]
    if report.comparisons:
        parts += ["## Comparisons", _table(*comparison_rows(report))]
    if samples:
        parts += ["## Samples", _table(list(samples[0]), [list(sample.values()) for sample in samples])]
    signatures = {name: score.signature for s in report.systems.values() for name, score in s.metrics.items()}
    parts += ["## Settings", _table(["", ""], [[k, str(v)] for k, v in {**report.settings, **signatures}.items()])]
    return "\n\n".join(parts) + "\n"


def print_report(report: EvaluationReport, console: Console) -> None:
    """The scores and comparisons as tables in the terminal, and the verdict."""
    for title, (header, rows) in (("Test scores", score_rows(report)), ("Comparisons", comparison_rows(report))):
        if rows:
            table = Table(*header, title=title)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print(report.verdict, style="bold", markup=False)


def score_rows(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    """Header and one row per figure, one column per system."""
    systems = report.systems
    rows = []
    for metric in next(iter(systems.values())).metrics:
        scores = [system.metrics[metric] for system in systems.values()]
        rows.append([metric, *[f"{s.value:.2f} [{s.low:.2f}, {s.high:.2f}]" for s in scores]])
    figures = (
        ("mean reward", "mean_reward", ".4f"),
        ("cumulative reward", "cumulative_reward", ".2f"),
        ("cross-entropy, nats/token", "cross_entropy", ".3f"),
        ("perplexity", "perplexity", ".2f"),
        ("KL to SFT, nats/completion", "kl_to_sft", ".3f"),
        ("length, tokens", "length", ".1f"),
        ("finished", "finished", ".1%"),
    )
    for label, name, form in figures:
        values = [asdict(system)[name] for system in systems.values()]
        rows.append([label, *["-" if value is None else format(value, form) for value in values]])
    return ["", *systems], rows


def comparison_rows(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    """Header and one row per comparison."""
    rows = [
        [f"{c.b} - {c.a}", c.metric, f"{c.delta:+.3f}", f"[{c.low:+.3f}, {c.high:+.3f}]", f"{c.p_value:.3f}"]
        for c in report.comparisons
    ]
    return ["systems", "metric", "difference", "95 % interval", "p"], rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else float("nan")
