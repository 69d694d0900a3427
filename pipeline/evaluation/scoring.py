"""What is said of texts by the process that wrote them: rewards, sentence scores, what they add to a corpus."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Generic, TypeVar

from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.sampling import Text
from pipeline.evaluation.systems import Answers
from pipeline.metrics import AdditiveMetric, Metric
from pipeline.metrics.known_statistics import KnownStatistics
from pipeline.runtime.distributed import Parts

Kind = TypeVar("Kind", Prediction, Text)


@dataclass(frozen=True)
class Rewarded:
    """What the rewards say of N texts: the weighted sum and each part by name, both empty without rewards; and by
    text what failed."""

    scores: Sequence[float] = ()
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failures: Mapping[int, str] = field(default_factory=dict)


# Texts, which know their test rows -> what the rewards say of them.
ScoreTexts = Callable[[Sequence], Rewarded]


@dataclass(frozen=True)
class Judges:
    """What judges the texts: the metrics, the first of which decides; the rewards and their names; the settings."""

    metrics: Sequence[Metric]
    score: ScoreTexts
    rewards: Sequence[str]
    settings: EvalConfig
    seed: int

    @property
    def block(self) -> int:
        """Texts that are judged together, whoever judges them: the batch that one process or another has written."""
        return self.settings.per_device_eval_batch_size

    @property
    def sample_block(self) -> int:
        """The same for samples: all of a prompt, and as many prompts as are drawn under one seed."""
        copies = self.settings.samples_per_prompt
        return max(1, self.settings.per_device_eval_batch_size // max(1, copies)) * max(1, copies)


@dataclass(frozen=True)
class Judged(Generic[Kind]):
    """A text and what is said of it.

    `score` is the weighted reward, None without rewards, `rewards` its parts by name (NaN where one does not apply),
    `failure` what a reward failed of. By metric: `metrics` has the sentence score, `statistics` what the text adds to
    the corpus, where the corpus score is made of sums.
    """

    text: Kind
    score: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class JudgedAnswers:
    """All that a system wrote for the N test prompts, in order, with what is said of it; fields as in `Answers`."""

    predictions: list[Judged[Prediction]]
    beams: dict[int, list[Judged[Text]]] = field(default_factory=dict)
    samples: list[Judged[Text]] = field(default_factory=list)
    same_weights_as_sft: bool = False

    @property
    def every_kind(self) -> list[list[Judged]]:
        """Predictions, texts of each number of beams, samples."""
        return [self.predictions, *self.beams.values(), self.samples]


def judge(
    texts: Sequence[Kind],
    references: Sequence[Sequence[str]],
    judges: Judges,
    block: int,
    sentences: Sequence[Metric] = (),
    corpora: Sequence[Metric] = (),
) -> list[Judged[Kind]]:
    """What is said of texts, `block` at a time; `sentences` score each, for `corpora` is counted what it adds.

    `references` are those of every test row. Whole blocks, because a learned reward rounds by what stands beside a
    text, and a function of anyone's may look at it.
    """
    found: list[Judged[Kind]] = []
    for start in range(0, len(texts), block):
        part = texts[start : start + block]
        said, completions = judges.score(part), [text.completion for text in part]
        wanted = [references[text.index] for text in part]
        scores = {m.name: m.sample_scores(completions, wanted) for m in sentences}
        counted = {m.name: m.statistics(completions, wanted) for m in corpora if isinstance(m, AdditiveMetric)}
        found += [
            Judged(
                text,
                said.scores[i] if said.scores else None,
                {name: values[i] for name, values in said.parts.items()},
                {name: values[i] for name, values in scores.items()},
                {name: rows[i].tolist() for name, rows in counted.items()},
                said.failures.get(i),
            )
            for i, text in enumerate(part)
        ]
    return found


def write_judged(
    parts: Parts, system: str, answers: Answers, references: Sequence[Sequence[str]], judges: Judges
) -> None:
    """Judge this process's share of what a system wrote, and write it where the main process will read it."""
    metrics = judges.metrics
    predictions = judge(answers.predictions, references, judges, judges.block, metrics, metrics)
    _write(parts, f"{system}/predictions", predictions)
    for beams, texts in answers.beams.items():
        _write(parts, f"{system}/beams-{beams}", judge(texts, references, judges, judges.block, corpora=metrics))
    samples = judge(answers.samples, references, judges, judges.sample_block, metrics[:1])
    _write(parts, f"{system}/samples", samples)


def _write(parts: Parts, name: str, texts: Sequence[Judged]) -> None:
    parts.write(name, ((judged.text.index, asdict(judged)) for judged in texts))


def read_judged(parts: Parts, system: str, own: Answers) -> JudgedAnswers:
    """All that a system wrote, from the parts of all processes; `own` is this one's share."""

    def read(name: str, kind: type[Kind]) -> list[Judged[Kind]]:
        return [Judged(**{**line, "text": kind(**line["text"])}) for line in parts.read(f"{system}/{name}")]

    return JudgedAnswers(
        read("predictions", Prediction),
        {beams: read(f"beams-{beams}", Text) for beams in own.beams},
        read("samples", Text),
        own.same_weights_as_sft,
    )


def with_statistics(
    metrics: Sequence[Metric], answers: Mapping[str, JudgedAnswers], references: Sequence[Sequence[str]]
) -> list[Metric]:
    """The metrics, knowing what has been counted already for the texts of all systems."""
    found: list[Metric] = []
    for metric in metrics:
        known = (
            (judged.text.completion, references[judged.text.index], judged.statistics[metric.name])
            for system in answers.values()
            for texts in system.every_kind
            for judged in texts
            if metric.name in judged.statistics
        )
        found.append(KnownStatistics(metric, known) if isinstance(metric, AdditiveMetric) else metric)
    return found
