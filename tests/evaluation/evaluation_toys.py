"""Predictions and reports whose figures are easy to check."""

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

from pipeline.evaluation.assemble import assemble_report
from pipeline.evaluation.clusters import Clusters
from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.decodings import DecodedText
from pipeline.evaluation.divergence import SampleMeasure
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.report import EvaluationReport, Outputs, TestSet
from pipeline.evaluation.scoring import ScoredPrediction, ScoredSystem, Scoring, compute_sentence_scores
from pipeline.metrics import Metric, load_metric
from pipeline.rewards import Handling, Reward

BLEU = load_metric("bleu")
TER = load_metric("ter")


def prediction(completion: str = "a text", **changes) -> Prediction:
    """A prediction with figures that are easy to add up."""
    defaults = Prediction(
        index=0,
        completion=completion,
        completion_ids=[*map(ord, completion), 2],
        finished=True,
        reference_nats=3.0,
        reference_tokens=3,
    )
    return replace(defaults, **changes)


REFERENCES = [["the cat sat on the mat"], ["it rains in the north"], ["five red apples"], ["we go home now"]] * 3
GOOD = [texts[0] for texts in REFERENCES]
BAD = ["a dog", "sunshine", "green pears", "they stay"] * 3
MIXED = [good if i % 2 else bad for i, (good, bad) in enumerate(zip(GOOD, BAD, strict=True))]
TEST = TestSet([f"prompt {number}" for number in range(12)], REFERENCES)


def make_report(
    texts: dict[str, list[str]],
    scores: dict[str, list[float]] | None = None,
    metrics: Sequence[Metric] = (BLEU,),
    rewards: Sequence[str] = ("mine",),
    samples: dict[str, list[str]] | None = None,
    same_weights: Sequence[str] = (),
    clusters: Clusters | None = None,
    changes: dict[str, dict] | None = None,
    measures: dict[str, SampleMeasure] | None = None,
    **settings,
) -> tuple[EvaluationReport, dict[str, Outputs]]:
    """A report over systems that wrote the given texts.

    `changes` are figures of a system's predictions, `measures` what every sample of a system gives.
    """
    config = EvalConfig(samples_per_prompt=2)
    scoring = Scoring(metrics, [Reward(name, lambda **_: []) for name in rewards], Handling(), config, 0, clusters)
    scores = scores if scores is not None else {name: [0.5] * len(completions) for name, completions in texts.items()}
    changes, samples, measures = changes or {}, samples or {}, measures or {}
    systems, outputs = {}, {}
    for name, completions in texts.items():
        items = [
            # Eight tokens whatever the text, the same for the same text.
            prediction(text, **{"index": i, "completion_ids": [crc32(text.encode())] * 8, **changes.get(name, {})})
            for i, text in enumerate(completions)
        ]
        measured = [measures.get(name, SampleMeasure(8, 2.0, 0.5))] * len(completions)
        drawn = [ScoredPrediction(DecodedText(i // 2, text, [1, 2])) for i, text in enumerate(samples.get(name, []))]
        systems[name] = ScoredSystem(
            compute_sentence_scores([ScoredPrediction(item) for item in items], REFERENCES, metrics),
            samples=compute_sentence_scores(drawn, REFERENCES, metrics[:1]),
            measures=measured,
            same_weights_as_sft=name in same_weights,
        )
        parts = {"mine": scores[name]} if name in scores else {}
        sentences = {m.name: m.sample_scores(completions, REFERENCES) for m in metrics}
        outputs[name] = Outputs(items, scores.get(name, []), parts, sentences, measured)
    return assemble_report(systems, outputs, replace(TEST, clusters=clusters), scoring, settings, []), outputs
