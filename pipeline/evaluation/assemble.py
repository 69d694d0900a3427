"""Assemble the report from what the systems wrote and its scores: figures, comparisons, findings, warnings."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from pipeline.evaluation.agreement import agreement_findings, agreement_warnings, reward_agreement
from pipeline.evaluation.config import BASELINES, CONTROL
from pipeline.evaluation.curves import PANELS, Panel, read_cost, read_panels
from pipeline.evaluation.decodings import BestOfN, DecodingScores, expected_best
from pipeline.evaluation.gains import Gains, find_gains
from pipeline.evaluation.inspection import Inspection, inspect_systems
from pipeline.evaluation.predictions import save_predictions
from pipeline.evaluation.recognition import Recognition, recognition_errors, word_metric
from pipeline.evaluation.report import (
    REWARD,
    EvaluationReport,
    Outputs,
    ReportExample,
    Resampling,
    StageCost,
    TestSet,
    compare_systems,
    score_system,
)
from pipeline.evaluation.scoring import ScoredPrediction, ScoredSystem, Scoring, compute_system_metrics
from pipeline.evaluation.systems import Source
from pipeline.evaluation.text_statistics import text_statistics
from pipeline.evaluation.verdict import find_warnings, findings, verdict
from pipeline.metrics.sacrebleu_metric import short_references
from pipeline.models.speech import CLIP
from pipeline.models.text import plain_text
from pipeline.rewards import LEARNED
from pipeline.runtime.memory import peak_memory_mib


@dataclass(frozen=True)
class Details:
    """What the pages show besides the report's figures: examples, curves of the training, a few inspected examples.

    `num_samples` of the examples go into report.md, `num_listed` into report.html.
    """

    examples: list[ReportExample]
    panels: list[Panel] = field(default_factory=list)
    inspections: list[Inspection] = field(default_factory=list)
    num_samples: int = 5
    num_listed: int = 500


def training_stages(sources: Sequence[Source], run: Path, rewards: Sequence[str]) -> list[str]:
    """Return the stages of a run from which the systems come, in order; others may be there of an earlier recipe."""
    read = {place for source in sources for place in (source.path, source.base)}
    learned = any(reward.startswith(f"{LEARNED} x") for reward in rewards)
    there = {name: run / name in read for name in ("sft", "reward", "ppo", CONTROL, *BASELINES)}
    return [name for name, is_read in (there | {"reward": learned and there["ppo"]}).items() if is_read]


def build_report(
    systems: Mapping[str, ScoredSystem],
    sources: Sequence[Source],
    rows: Dataset,
    scoring: Scoring,
    settings: Mapping[str, object],
    run: Path,
    began: float,
) -> tuple[EvaluationReport, Details]:
    """Build the report on the test `rows`, and write the predictions, in the directory of a run.

    `systems` have their rewards; `began` is when the stage began, by `time.monotonic`. Only the main process calls
    this.
    """
    prompts, are_sounds = [plain_text(prompt) for prompt in rows["prompt"]], CLIP in rows.column_names
    test = TestSet(prompts, list(rows["references"]), scoring.clusters, are_sounds)
    systems = compute_system_metrics(systems, test.references, scoring.metrics)
    outputs = save_outputs(systems, rows, run / "eval", () if test.clusters is None else test.clusters.numbers)
    stages = training_stages(sources, run, settings["rewards"])
    report = assemble_report(systems, outputs, test, scoring, settings, read_cost(run, stages))
    details = Details(
        examples=all_examples(test, outputs, scoring.metrics[0].name),
        panels=read_panels(run, {stage: titles for stage, titles in PANELS.items() if stage in stages}),
        inspections=inspect_systems(sources, rows, outputs, report.gains, scoring.settings.num_inspected),
        num_samples=scoring.settings.num_samples,
        num_listed=scoring.settings.num_listed,
    )
    report = replace(report, recognition=_recognition(systems, outputs, test, scoring, rows, settings))
    report.cost.append(evaluation_cost(began, systems))
    return report, details


def _recognition(
    systems: Mapping[str, ScoredSystem],
    outputs: Mapping[str, Outputs],
    test: TestSet,
    scoring: Scoring,
    rows: Dataset,
    settings: Mapping[str, object],
) -> dict[str, Recognition]:
    """Count the word errors of every system, where the report has a WER."""
    texts = {name: output.texts for name, output in outputs.items()}
    samples = {name: [sample.text.completion for sample in system.samples] for name, system in systems.items()}
    metric, column, copies = word_metric(scoring.metrics), settings.get("cluster"), scoring.settings.samples_per_prompt
    return recognition_errors(texts, samples, test.references, metric, rows, column, copies)


def evaluation_cost(began: float, systems: Mapping[str, ScoredSystem]) -> StageCost:
    """Measure what this stage took until its report is written; tokens are those of completions that it wrote."""
    seconds = round(time.monotonic() - began, 3)
    written = [scored.text for system in systems.values() if not system.is_kept for scored in system.predictions]
    tokens = sum(len(text.completion_ids) for text in written)
    processes = PartialState().num_processes
    return StageCost("eval", seconds, processes, None, None, tokens, tokens / seconds, peak_memory_mib())


def save_outputs(
    systems: Mapping[str, ScoredSystem], rows: Dataset, directory: Path, clusters: Sequence[int] = ()
) -> dict[str, Outputs]:
    """Write every system's completions and their scores to predictions/*.jsonl, and return them by system.

    `clusters` are the numbers of the rows' clusters, if they have any.
    """
    outputs = {}
    for name, system in systems.items():
        scored = system.predictions
        rewards = {key: [s.rewards[key] for s in scored] for key in scored[0].rewards}
        sentences = {metric: [s.metrics[metric] for s in scored] for metric in scored[0].metrics}
        texts = [s.text for s in scored]
        outputs[name] = Outputs(texts, reward_scores(scored), rewards, sentences, system.measures)
        save_predictions(
            directory / prediction_file(name),
            outputs[name].predictions,
            rows,
            rewards,
            outputs[name].scores,
            sentences,
            clusters,
        )
    return outputs


def reward_scores(scored: Sequence[ScoredPrediction]) -> list[float]:
    """Return the weighted reward of each text; an empty list without rewards."""
    return [s.score for s in scored if s.score is not None]


def prediction_file(system: str) -> str:
    """Return where a system's predictions are, relative to the report's directory."""
    return f"predictions/{system}.jsonl"


def assemble_report(
    systems: Mapping[str, ScoredSystem],
    outputs: Mapping[str, Outputs],
    test: TestSet,
    scoring: Scoring,
    settings: Mapping[str, object],
    cost: Sequence[StageCost],
) -> EvaluationReport:
    """Compute all figures and the words about them; `settings` are what the report says of the run."""
    metrics, first = scoring.metrics, scoring.metrics[0].name
    resampling = Resampling(scoring.settings.n_bootstrap, scoring.settings.confidence, scoring.seed)
    figures = {
        name: score_system(
            outputs[name], test, metrics, resampling, prediction_file(name), systems[name].same_weights_as_sft
        )
        for name in systems
    }
    comparisons = compare_systems(outputs, test, metrics, resampling)
    prompts = None if test.are_sounds else test.prompts
    references = text_statistics(test.first_references, test.first_references, prompts)
    predictions = {name: output.predictions for name, output in outputs.items()}
    best_of = best_of_samples(systems, outputs, scoring)
    agreement = reward_agreement(systems, LEARNED, first)
    rewards = [reward.name for reward in scoring.rewards]
    return EvaluationReport(
        systems=figures,
        comparisons=comparisons,
        verdict=verdict(comparisons, first, resampling.n_resamples),
        findings=findings(comparisons, figures, best_of, first, settings) + agreement_findings(agreement),
        warnings=find_warnings(predictions, comparisons, figures, references, rewards)
        + agreement_warnings(agreement)
        + [text for metric in metrics if (text := short_references(metric, test.references))],
        settings=dict(settings),
        references=references,
        decodings=decoding_scores(systems, test, scoring),
        best_of=best_of,
        gains=gains_of_ppo(first, outputs, test),
        cost=list(cost),
        reward_agreement=agreement,
        lower_is_better=[metric.name for metric in metrics if not metric.higher_is_better],
    )


def gains_of_ppo(metric: str, outputs: Mapping[str, Outputs], test: TestSet) -> Gains | None:
    """Find PPO's gains on SFT by the sentence scores of `metric`; None where one of them was not evaluated."""
    if "sft" not in outputs or "ppo" not in outputs:
        return None
    sft, ppo = outputs["sft"], outputs["ppo"]
    scores = sft.metric_scores[metric], ppo.metric_scores[metric]
    return find_gains("sft", "ppo", metric, *scores, (sft.texts, ppo.texts), test.first_references)


def all_examples(test: TestSet, outputs: Mapping[str, Outputs], metric: str) -> list[ReportExample]:
    """List every test example with every system's completion."""
    gains = [0.0] * len(test.prompts)
    if "sft" in outputs and "ppo" in outputs:
        pairs = zip(outputs["sft"].metric_scores[metric], outputs["ppo"].metric_scores[metric], strict=True)
        gains = [after - before for before, after in pairs]
    texts = {name: output.texts for name, output in outputs.items()}
    return [
        ReportExample(row, prompt, reference, {name: column[row] for name, column in texts.items()}, gains[row])
        for row, (prompt, reference) in enumerate(zip(test.prompts, test.first_references, strict=True))
    ]


def decoding_scores(systems: Mapping[str, ScoredSystem], test: TestSet, scoring: Scoring) -> list[DecodingScores]:
    """Score every system under the report's decoding and under each of `beam_sizes`; an empty list without these."""
    rows = []
    for name in systems if scoring.settings.beam_sizes else ():
        decoded = {scoring.settings.num_beams: systems[name].predictions, **systems[name].beams}
        for beams, scored in decoded.items():
            rewards = reward_scores(scored)
            completions = [s.text.completion for s in scored]
            plain = [m.corpus_score(completions, test.references, n_bootstrap=0) for m in scoring.metrics]
            values = {m.name: score.value for m, score in zip(scoring.metrics, plain, strict=True)}
            length = sum(len(s.text.completion_ids) for s in scored) / len(scored)
            mean = sum(rewards) / len(rewards) if rewards else None
            rows.append(DecodingScores(name, decoding_name(beams), values, mean, length))
    return rows


def decoding_name(num_beams: int) -> str:
    """Name a decoding in words: greedy, or how many beams."""
    return "greedy" if num_beams == 1 else f"beam search, {num_beams} beams"


def best_of_samples(
    systems: Mapping[str, ScoredSystem], outputs: Mapping[str, Outputs], scoring: Scoring
) -> dict[str, BestOfN]:
    """Estimate the best of n samples of every system that drew some, by the reward and by the first metric."""
    best_of, copies, metric = {}, scoring.settings.samples_per_prompt, scoring.metrics[0].name
    for name, system in systems.items():
        if not system.samples:
            continue
        rewards = reward_scores(system.samples)
        scores = {REWARD: rewards} if rewards else {}
        scores[metric] = [s.metrics[metric] for s in system.samples]
        prompts = len(system.samples) // copies
        curves = {
            key: expected_best([values[i : i + copies] for i in range(0, len(values), copies)])
            for key, values in scores.items()
        }
        decoded = {REWARD: outputs[name].scores, **outputs[name].metric_scores}
        means = {key: sum(decoded[key][:prompts]) / prompts for key in scores}
        decoding = decoding_name(scoring.settings.num_beams)
        best_of[name] = BestOfN(prompts, scoring.settings.sample_temperature, curves, means, decoding)
    return best_of
