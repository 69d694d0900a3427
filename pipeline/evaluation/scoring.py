"""Score what systems wrote: rewards on every process for its share, metrics of single texts on the main process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from datasets import Dataset

from pipeline.evaluation.clusters import Clusters
from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.decodings import DecodedText, sample_block_size
from pipeline.evaluation.divergence import SampleMeasure
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.system_predictions import SystemPredictions
from pipeline.metrics import Metric
from pipeline.rewards import Handling, Reward
from pipeline.rewards.rows import compute_row_rewards
from pipeline.runtime.distributed import gather_rows

Kind = TypeVar("Kind", Prediction, DecodedText)


@dataclass(frozen=True)
class Scoring:
    """How texts are scored: by `metrics`, the first of which decides, and by `rewards`, which may be none.

    `handling` says what a reward that fails costs; `seed` is that of the resampling, which draws whole `clusters` of
    the test rows where they belong together. Rewards are computed in a block of `gathered()`.
    """

    metrics: Sequence[Metric]
    rewards: Sequence[Reward]
    handling: Handling
    settings: EvalConfig
    seed: int
    clusters: Clusters | None = None
    gathered: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class ScoredPrediction(Generic[Kind]):
    """A text with its scores.

    `score` is the weighted reward, None without rewards; `rewards` has its parts by name, NaN where one does not
    apply; `failure` says why a reward failed; `metrics` has the sentence score by metric.
    """

    text: Kind
    score: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class ScoredSystem:
    """What a system wrote for the N test prompts, in order, with its scores; fields as in `SystemPredictions`."""

    predictions: list[ScoredPrediction[Prediction]]
    beams: dict[int, list[ScoredPrediction[DecodedText]]] = field(default_factory=dict)
    samples: list[ScoredPrediction[DecodedText]] = field(default_factory=list)
    measures: list[SampleMeasure] = field(default_factory=list)
    same_weights_as_sft: bool = False
    is_kept: bool = False

    @property
    def failures(self) -> list[str]:
        """Return why rewards failed, a sentence for each text."""
        texts = [*self.predictions, *(text for beam in self.beams.values() for text in beam), *self.samples]
        return [text.failure for text in texts if text.failure is not None]


def compute_system_rewards(
    predictions: Mapping[str, SystemPredictions], rows: Dataset, scoring: Scoring
) -> dict[str, ScoredSystem]:
    """Compute the rewards of everything that the systems wrote for the test prompts, on every process."""
    size, copies = scoring.settings.per_device_eval_batch_size, max(1, scoring.settings.samples_per_prompt)
    return {
        name: ScoredSystem(
            compute_text_rewards(system.predictions, rows, scoring, size),
            {beams: compute_text_rewards(texts, rows, scoring, size) for beams, texts in system.beams.items()},
            compute_text_rewards(system.samples, rows, scoring, sample_block_size(size, copies)),
            system.measures,
            system.same_weights_as_sft,
            system.is_kept,
        )
        for name, system in predictions.items()
    }


def compute_text_rewards(
    texts: Sequence[Kind], rows: Dataset, scoring: Scoring, block_size: int
) -> list[ScoredPrediction[Kind]]:
    """Compute the rewards of texts, every process those of its blocks; of all texts, on every process.

    The blocks are the same for any number of processes: what else is in a batch changes the rounding of a learned
    reward, and a reward function may compare the completions it is given.
    """
    if not scoring.rewards:
        return [ScoredPrediction(text) for text in texts]

    def compute(block: Sequence[int]) -> list[ScoredPrediction[Kind]]:
        chosen = [texts[number] for number in block]
        outputs = compute_row_rewards(
            scoring.rewards,
            rows.select([text.index for text in chosen]),
            [text.completion for text in chosen],
            [text.completion_ids for text in chosen],
            scoring.handling,
        )
        scores = outputs.weighted_sum.tolist()
        by_name = {name: values.tolist() for name, values in outputs.by_name.items()}
        return [
            ScoredPrediction(
                text,
                scores[i],
                {name: values[i] for name, values in by_name.items()},
                failure=outputs.failures.get(i),
            )
            for i, text in enumerate(chosen)
        ]

    blocks = [range(start, min(start + block_size, len(texts))) for start in range(0, len(texts), block_size)]
    return gather_rows(blocks, compute, scoring.gathered())


def compute_system_metrics(
    systems: Mapping[str, ScoredSystem], references: Sequence[Sequence[str]], metrics: Sequence[Metric]
) -> dict[str, ScoredSystem]:
    """Add the sentence scores: of predictions by every metric, of samples by the first one."""
    return {
        name: replace(
            system,
            predictions=compute_sentence_scores(system.predictions, references, metrics),
            samples=compute_sentence_scores(system.samples, references, metrics[:1]),
        )
        for name, system in systems.items()
    }


def compute_sentence_scores(
    texts: Sequence[ScoredPrediction[Kind]], references: Sequence[Sequence[str]], metrics: Sequence[Metric]
) -> list[ScoredPrediction[Kind]]:
    """Add the sentence scores by `metrics` to texts; `references` are those of every test row."""
    if not texts:
        return []
    completions = [scored.text.completion for scored in texts]
    wanted = [references[scored.text.index] for scored in texts]
    values = {metric.name: metric.sample_scores(completions, wanted) for metric in metrics}
    return [
        replace(scored, metrics={name: scores[i] for name, scores in values.items()}) for i, scored in enumerate(texts)
    ]
