"""The report's figures as rows of text, the same for Markdown, HTML and the terminal."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.clusters import sizes_text
from pipeline.evaluation.decodings import BestOfN
from pipeline.evaluation.gains import Bucket
from pipeline.evaluation.power import decimals, p_cell
from pipeline.evaluation.report import EvaluationReport, System, SystemComparison
from pipeline.evaluation.significance import SMALL

MISSING = "-"
ERROR_RATES = ("wer", "cer", "ter")  # whose score of a single text is 1 minus the rate


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, rows of cells, and a note below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


# Label, figure of a system, format.
FIGURES: tuple[tuple[str, Callable[[System], float | None], str], ...] = (
    ("mean reward", lambda s: s.mean_reward, ".4f"),
    ("cumulative reward", lambda s: s.cumulative_reward, ".2f"),
    ("cross-entropy, nats/token", lambda s: s.cross_entropy, ".3f"),
    ("perplexity", lambda s: s.perplexity, ".2f"),
    ("length, tokens", lambda s: s.length, ".1f"),
    ("finished", lambda s: s.finished, ".1%"),
)
# Label, figure of a system's samples, its standard error.
SAMPLED_FIGURES: tuple[tuple[str, Callable[[System], float | None], Callable[[System], float | None]], ...] = (
    ("KL to SFT, nats/completion", lambda s: s.kl_to_sft, lambda s: s.kl_to_sft_error),
    ("entropy, nats/token", lambda s: s.entropy, lambda s: s.entropy_error),
)
TEXT_FIGURES = (
    ("length ratio, words", "length_ratio", ".3f"),
    ("repeated trigrams", "repetition", ".1%"),
    ("distinct-1", "distinct_1", ".4f"),
    ("distinct-2", "distinct_2", ".4f"),
    ("copied from the prompt", "copy_rate", ".1%"),
    ("word pairs not in the prompt", "novel_2", ".1%"),
    ("empty", "empty", ".1%"),
    ("most frequent text", "most_common", ".1%"),
)


def score_table(report: EvaluationReport) -> Table:
    """Make the table of scores: a row for each figure, a column for each system."""
    systems = list(report.systems.values())
    rows = []
    for metric in systems[0].metrics:
        scores = [system.metrics[metric] for system in systems]
        places = decimals(max((s.high - s.low) / 4 for s in scores))  # an interval is about four errors wide
        rows.append([metric, *[f"{s.value:.{places}f} [{s.low:.{places}f}, {s.high:.{places}f}]" for s in scores]])
    for label, figure, form in FIGURES:
        rows.append([label, *_formatted((figure(system) for system in systems), form)])
        if label == "mean reward" and len(systems[0].rewards) > 1:
            for name in systems[0].rewards:
                rows.append([f"reward {name}", *_formatted((s.rewards.get(name) for s in systems), ".4f")])
    rows += [[label, *(_with_error(figure(s), error(s)) for s in systems)] for label, figure, error in SAMPLED_FIGURES]
    confidence = report.settings.get("confidence", 0.95)
    clusters = report.settings.get("clusters")
    drawn = f"over {clusters} clusters of test examples" if clusters else "over the test examples"
    errors = ", ".join(report.lower_is_better)
    direction = f"{errors}: lower is better. " if errors else ""
    note = (
        f"{direction}[a, b]: {confidence:.0%} bootstrap interval {drawn}. KL and entropy are those of "
        f"{systems[0].samples:,} samples of each system at PPO's temperature, ± their standard errors; all else is of "
        "the completions."
    )
    return Table("Scores", ["", *report.systems], rows, note)


def text_table(report: EvaluationReport) -> Table:
    """Make the table of text statistics, with the references as the last column."""
    texts = [*(system.texts for system in report.systems.values()), report.references]
    rows = [[label, *_formatted((getattr(t, name) for t in texts), form)] for label, name, form in TEXT_FIGURES]
    note = "distinct-n: different n-grams of all texts, as a share of all n-grams. Words are lower-cased."
    return Table("Texts", ["", *report.systems, "references"], rows, note)


def comparison_table(report: EvaluationReport) -> Table:
    """Make the table of comparisons, a row for each."""

    def places(comparison: SystemComparison) -> int:
        return max(3, decimals(comparison.standard_error))

    header = ["systems", "metric", "difference", "95 % interval", "p", "p Holm", "p randomised", "std. error"]
    header += ["smallest seen", "wins", "losses", "P(better)"]
    rows = [
        [
            f"{c.b} - {c.a}",
            c.metric,
            f"{c.delta:+.{places(c)}f}",
            f"[{c.low:+.{places(c)}f}, {c.high:+.{places(c)}f}]",
            *map(p_cell, (c.p_value, c.p_holm, c.p_randomisation)),
            f"{c.standard_error:.{places(c)}f}",
            f"{c.smallest_difference:.{places(c)}f}",
            *(f"{share:.0%}" for share in (c.wins, c.losses, c.p_better)),
        ]
        for c in report.comparisons
    ]
    drawn = ""
    if report.comparisons and report.comparisons[0].clusters < report.comparisons[0].examples:
        drawn = f"{sizes_text(report.comparisons[0].examples, report.comparisons[0].clusters)}, drawn as a whole; "
    note = (
        f"{drawn}p: two-sided, from the paired bootstrap; below {SMALL} examples or clusters from paired "
        "randomisation; where every example is right or wrong from McNemar's test (mid-p), with clusters from paired "
        "randomisation; Holm: corrected for all rows of this table; randomised: paired approximate randomisation; "
        "smallest seen: the difference that the test finds with 80 % power; wins and losses: shares of the examples "
        "on which the first-named system is better and worse; P(better): its chance to be better on one example, ties "
        "counted half."
    )
    return Table("Comparisons", header, rows, note)


def decoding_table(report: EvaluationReport) -> Table:
    """Make the table of every system under every decoding."""
    if not report.decodings:
        return Table("Decoding", [], [])
    metrics = list(report.decodings[0].metrics)
    rows = [
        [d.system, d.decoding, *_formatted([*d.metrics.values(), d.mean_reward], ".3f"), f"{d.length:.1f}"]
        for d in report.decodings
    ]
    return Table("Decoding", ["system", "decoding", *metrics, "mean reward", "length, tokens"], rows)


def sentence_score_name(report: EvaluationReport, name: str) -> str:
    """Return what the scores of single texts by a measure are called; of each of them more is better."""
    if name not in report.lower_is_better:
        return name
    if name in ERROR_RATES:
        return f"1 - {name}"
    return f"-{name}" if name.startswith("evaluate:") else f"{name}, turned: more is better"


def best_of_table(report: EvaluationReport) -> Table:
    """Make the table of the expected best of 1, 2, ... n samples of every system."""
    if not report.best_of:
        return Table("Best of n samples", [], [])
    first = next(iter(report.best_of.values()))
    numbers = [str(n + 1) for n in range(len(next(iter(first.curves.values()))))]
    rows = [
        [system, sentence_score_name(report, name), f"{best_of.decoded[name]:.3f}", *_formatted(curve, ".3f")]
        for system, best_of in report.best_of.items()
        for name, curve in best_of.curves.items()
    ]
    note = best_of_note(first)
    return Table("Best of n samples", ["system", "score", "as decoded above", *numbers], rows, note)


def best_of_note(best_of: BestOfN) -> str:
    """Say how the samples were drawn."""
    return (
        f"First {best_of.prompts} test prompts at temperature {best_of.temperature:g}; the best is chosen by knowing "
        "the score, which a system in use does not, so this is a ceiling. Metrics are means of sentence scores."
    )


def agreement_table(report: EvaluationReport) -> Table:
    """Make the table of how the learned reward ranks the samples of every system, compared with the metric."""
    rows = [
        [
            system,
            f"{a.accuracy.value:.1%} [{a.accuracy.low:.1%}, {a.accuracy.high:.1%}]",
            *_formatted([a.within_prompt], "+.3f"),
            *(_formatted([a.change], "+.1%")),
            MISSING if a.low is None else f"[{a.low:+.1%}, {a.high:+.1%}]",
            str(a.accuracy.count),
            str(a.accuracy.clusters),
        ]
        for system, a in report.reward_agreement.items()
    ]
    header = ["samples of", "ranked alike", "r within prompts", "against sft", "95 % interval", "pairs", "prompts"]
    note = (
        "Pairs of samples of one prompt that the learned reward and the metric rank alike, of all pairs that the "
        "metric tells apart. Where this falls from SFT to PPO, PPO has learnt the reward's mistakes."
    )
    return Table("Learned reward on the systems' own samples", header, rows, note)


def bucket_tables(report: EvaluationReport) -> list[Table]:
    """Make the tables of the gains by length of the reference and by the first system's score."""
    gains = report.gains
    if gains is None:
        return []
    metric = sentence_score_name(report, gains.metric)
    names = [f"{gains.a} {metric}", f"{gains.b} {metric}", "gain"]
    note = (
        "A score that is low by chance is higher the next time, so low groups gain and high ones lose by noise alone."
    )
    return [
        Table("By length of the reference", ["group", "examples", *names], _bucket_rows(gains.by_length)),
        Table(f"By {gains.a}'s score", ["group", "examples", *names], _bucket_rows(gains.by_quality), note),
    ]


def _bucket_rows(buckets: Sequence[Bucket]) -> list[list[str]]:
    return [[b.label, str(b.count), f"{b.score_a:.3f}", f"{b.score_b:.3f}", f"{b.gain:+.3f}"] for b in buckets]


def cost_table(report: EvaluationReport) -> Table:
    """Make the table of what each stage took."""
    header = ["stage", "time", "processes", "steps", "episodes", "tokens", "tokens/s", "peak memory"]
    rows = [
        [
            c.stage,
            MISSING if c.seconds is None else duration(c.seconds),
            *_formatted((c.processes, c.steps, c.episodes, c.tokens), ",d"),
            *_formatted([c.tokens_per_second], ",.0f"),
            MISSING if c.peak_memory_mib is None else f"{c.peak_memory_mib:,.0f} MiB",
        ]
        for c in report.cost
    ]
    note = (
        "Tokens: trained on (sft), sampled (ppo), written for this report (eval); per second of the whole stage. "
        "Memory: the largest process; on an accelerator, what torch allocated there."
    )
    return Table("Cost", header, rows, note)


def settings_table(report: EvaluationReport) -> Table:
    """Make the table of the settings and the metrics' signatures."""
    first = next(iter(report.systems.values()))
    signatures = {name: score.signature for name, score in first.metrics.items()}
    rows = [[key, _plain(value)] for key, value in {**report.settings, **signatures}.items()]
    return Table("Settings", ["", ""], rows)


def duration(seconds: float) -> str:
    """Format a duration: `42 s`, `3 min 12 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _formatted(values: Iterable[float | None], form: str) -> list[str]:
    return [MISSING if value is None else format(value, form) for value in values]


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _plain(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, dict) and value.keys() == {"name", "options"}:  # a metric
        return f"{value['name']} ({_plain(value['options'])})" if value["options"] else str(value["name"])
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
