"""From the systems' answers to the report: rewards and metrics of every text, figures, comparisons, words."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from pipeline.evaluation.gains import Gains, find_gains
from pipeline.evaluation.pages.render import Sample
from pipeline.evaluation.predictions import save_predictions
from pipeline.evaluation.report import (
    REWARD,
    EvaluationReport,
    Outputs,
    Resampling,
    StageCost,
    TestSet,
    compare_systems,
    compared_pairs,
    score_system,
)
from pipeline.evaluation.sampling import BestOfN, DecodingScores, expected_best
from pipeline.evaluation.scoring import Judged, JudgedAnswers, Judges
from pipeline.evaluation.text_statistics import text_statistics
from pipeline.evaluation.verdict import find_warnings, findings, verdict


def outputs_of(answers: Mapping[str, JudgedAnswers], rows: Dataset, directory: Path) -> dict[str, Outputs]:
    """Every system's completions with their rewards and sentence scores, which also go to predictions/*.jsonl."""
    outputs = {}
    for name, found in answers.items():
        judged = found.predictions
        parts = {part: [j.rewards[part] for j in judged] for part in judged[0].rewards}
        sentences = {metric: [j.metrics[metric] for j in judged] for metric in judged[0].metrics}
        outputs[name] = Outputs([j.text for j in judged], rewards_of(judged), parts, sentences)
        save_predictions(
            directory / prediction_file(name), outputs[name].predictions, rows, parts, outputs[name].scores, sentences
        )
    return outputs


def rewards_of(judged: Sequence[Judged]) -> list[float]:
    """The weighted reward of each text; nothing without rewards."""
    return [j.score for j in judged if j.score is not None]


def prediction_file(system: str) -> str:
    """Where a system's predictions are, from the report's directory."""
    return f"predictions/{system}.jsonl"


def assemble_report(
    answers: Mapping[str, JudgedAnswers],
    outputs: Mapping[str, Outputs],
    test: TestSet,
    judges: Judges,
    settings: Mapping[str, object],
    cost: Sequence[StageCost],
) -> EvaluationReport:
    """All figures and words; `settings` are what the report says of the run."""
    metrics, first = judges.metrics, judges.metrics[0].name
    resampling = Resampling(judges.settings.n_bootstrap, judges.settings.confidence, judges.seed)
    systems = {
        name: score_system(
            outputs[name], test, metrics, resampling, prediction_file(name), answers[name].same_weights_as_sft
        )
        for name in answers
    }
    comparisons = [
        comparison
        for a, b in compared_pairs(list(systems))
        for comparison in compare_systems(a, b, outputs, test, metrics, resampling)
    ]
    references = text_statistics(test.first_references, test.first_references, test.prompts)
    predictions = {name: found.predictions for name, found in outputs.items()}
    best_of = best_of_samples(answers, outputs, test, judges)
    return EvaluationReport(
        systems=systems,
        comparisons=comparisons,
        verdict=verdict(comparisons, first),
        findings=findings(comparisons, systems, best_of, first),
        warnings=find_warnings(predictions, comparisons, systems, references, judges.rewards),
        settings=dict(settings),
        references=references,
        decodings=decoding_scores(answers, test, judges),
        best_of=best_of,
        gains=gains_of_ppo(first, outputs, test),
        cost=list(cost),
    )


def gains_of_ppo(metric: str, outputs: Mapping[str, Outputs], test: TestSet) -> Gains | None:
    """PPO's gains on SFT by the first metric, where both were evaluated."""
    if "sft" not in outputs or "ppo" not in outputs:
        return None
    sft, ppo = outputs["sft"], outputs["ppo"]
    scores = sft.metric_scores[metric], ppo.metric_scores[metric]
    return find_gains("sft", "ppo", metric, *scores, (sft.texts, ppo.texts), test.first_references)


def all_samples(test: TestSet, outputs: Mapping[str, Outputs], metric: str) -> list[Sample]:
    """Every test example with every system's answer."""
    gains = [0.0] * len(test.prompts)
    if "sft" in outputs and "ppo" in outputs:
        pairs = zip(outputs["sft"].metric_scores[metric], outputs["ppo"].metric_scores[metric], strict=True)
        gains = [after - before for before, after in pairs]
    texts = {name: found.texts for name, found in outputs.items()}
    return [
        Sample(row, prompt, reference, {name: found[row] for name, found in texts.items()}, gains[row])
        for row, (prompt, reference) in enumerate(zip(test.prompts, test.first_references, strict=True))
    ]


def decoding_scores(answers: Mapping[str, JudgedAnswers], test: TestSet, judges: Judges) -> list[DecodingScores]:
    """Every system under the report's decoding and under each other number of beams; nothing without others."""
    found = []
    for name in answers if judges.settings.beam_sizes else ():
        for beams, texts in {judges.settings.num_beams: answers[name].predictions, **answers[name].beams}.items():
            scores = rewards_of(texts)
            completions = [judged.text.completion for judged in texts]
            plain = [m.corpus_score(completions, test.references, n_bootstrap=0) for m in judges.metrics]
            values = {m.name: score.value for m, score in zip(judges.metrics, plain, strict=True)}
            length = sum(len(judged.text.completion_ids) for judged in texts) / len(texts)
            mean = sum(scores) / len(scores) if scores else None
            found.append(DecodingScores(name, decoding_name(beams), values, mean, length))
    return found


def decoding_name(num_beams: int) -> str:
    """Greedy, or how many beams."""
    return "greedy" if num_beams == 1 else f"beam search, {num_beams} beams"


def best_of_samples(
    answers: Mapping[str, JudgedAnswers], outputs: Mapping[str, Outputs], test: TestSet, judges: Judges
) -> dict[str, BestOfN]:
    """The expected best of n samples of every system that drew some, by the reward and by the first metric."""
    found, copies, metric = {}, judges.settings.samples_per_prompt, judges.metrics[0]
    for name, answered in answers.items():
        texts = answered.samples
        if not texts:
            continue
        rewards = rewards_of(texts)
        scores = {REWARD: rewards} if rewards else {}
        scores[metric.name] = [judged.metrics[metric.name] for judged in texts]
        own, prompts = {REWARD: outputs[name].scores, **outputs[name].metric_scores}, len(texts) // copies
        curves = {
            key: expected_best([values[i : i + copies] for i in range(0, len(values), copies)])
            for key, values in scores.items()
        }
        decoded = {key: sum(own[key][:prompts]) / prompts for key in scores}
        found[name] = BestOfN(prompts, judges.settings.sample_temperature, curves, decoded)
    return found
