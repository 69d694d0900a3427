"""The evaluation's result: the figures of every system and the comparisons between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.evaluation.agreement import RewardAgreement
from pipeline.evaluation.closed_forms import holm
from pipeline.evaluation.clusters import Clusters, clustered_score
from pipeline.evaluation.config import BASELINES, CONTROL
from pipeline.evaluation.decodings import BestOfN, DecodingScores
from pipeline.evaluation.divergence import SampleMeasure, entropy_estimate, kl_estimate
from pipeline.evaluation.gains import Gains, Shares, paired_shares
from pipeline.evaluation.power import equivalence_margin, smallest_difference
from pipeline.evaluation.predictions import Prediction, cross_entropy
from pipeline.evaluation.recognition import Recognition
from pipeline.evaluation.significance import PairedTests, compare_texts, compare_values
from pipeline.evaluation.text_statistics import TextStatistics, text_statistics
from pipeline.metrics import Metric, Score

REWARD = "reward"


@dataclass(frozen=True)
class TestSet:
    """What the systems are scored on: N prompts as text, or names of sounds; N lists of references; any clusters."""

    __test__ = False  # pytest takes classes called Test... for tests

    prompts: list[str]
    references: list[list[str]]
    clusters: Clusters | None = None
    are_sounds: bool = False

    @property
    def num_clusters(self) -> int:
        """Count the clusters: every example is one where none belong together."""
        return len(self.prompts) if self.clusters is None else self.clusters.count

    @property
    def first_references(self) -> list[str]:
        """Return the first reference of each prompt, which SFT learns and cross-entropy is computed of."""
        return [texts[0] for texts in self.references]


@dataclass(frozen=True)
class Resampling:
    """How often and from which seed the examples are resampled, and what the scores' intervals cover."""

    n_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Outputs:
    """What one system wrote, and the numbers of each completion.

    `scores` is the weighted reward, `rewards` its parts by name (NaN where one does not apply), both empty without
    rewards; `metric_scores` the sentence score by metric, higher is better. `measures` are of samples of the system.
    """

    predictions: list[Prediction]
    scores: list[float] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    metric_scores: dict[str, list[float]] = field(default_factory=dict)
    measures: list[SampleMeasure] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """Return the completions."""
        return [prediction.completion for prediction in self.predictions]


@dataclass(frozen=True)
class System:
    """One system's figures on the test split.

    `mean_reward` and `cumulative_reward` are the mean and the sum of the weighted reward over the test completions,
    None without a `ppo:` section; `rewards` the mean of each part, None where it never applied. `cross_entropy`
    (nats per token) and `perplexity` are those of the references. `kl_to_sft` (nats per completion) and `entropy`
    (nats per token) are estimated from `samples` of its own at PPO's temperature, `sampled_length` tokens long; the
    errors are their standard errors. `length` is that of the completions in tokens, EOS included.
    `same_weights_as_sft` says that the model is the SFT model, bit for bit.
    """

    metrics: dict[str, Score]
    mean_reward: float | None
    cumulative_reward: float | None
    rewards: dict[str, float | None]
    cross_entropy: float
    perplexity: float
    kl_to_sft: float | None
    kl_to_sft_error: float | None
    entropy: float
    entropy_error: float | None
    samples: int
    sampled_length: float
    length: float
    finished: float
    texts: TextStatistics
    same_weights_as_sft: bool
    predictions: str

    @property
    def kl_per_token(self) -> float:
        """Return the KL to SFT in nats per token of the samples; 0 without SFT."""
        return (self.kl_to_sft or 0.0) / self.sampled_length


@dataclass(frozen=True)
class SystemComparison:
    """System `b` against system `a` by one metric, or by the reward.

    `delta` = b - a on the corpus scale, `low` and `high` its 95 % interval. `p_value` is that of `test`, which
    decides; `p_holm` is the same corrected for all comparisons of the run; `p_bootstrap` and `p_randomisation` are
    those of the paired bootstrap and of paired approximate randomisation; all are two-sided. `wins` and `losses` are
    the shares of the `examples` on which b is better and worse, whichever way the metric points, and `p_better` is the
    chance that b is better on one of them. `clusters` counts the groups that the examples are in. A test at 5 % finds
    `smallest_difference` with 80 % power; two one-sided tests at 5 % place the difference within plus and minus
    `equivalence_margin`.
    """

    a: str
    b: str
    metric: str
    delta: float
    low: float
    high: float
    p_value: float
    p_holm: float
    p_randomisation: float
    wins: float
    losses: float
    higher_is_better: bool
    test: str
    p_bootstrap: float
    p_better: float
    examples: int
    standard_error: float
    smallest_difference: float
    equivalence_margin: float
    clusters: int

    @property
    def gain(self) -> float:
        """Return `delta` with its sign chosen so that it is positive where b is better."""
        return self.delta if self.higher_is_better else -self.delta


@dataclass(frozen=True)
class StageCost:
    """What one stage took: wall-clock seconds, its steps, completions sampled in training, tokens trained on or
    written, and the peak memory of a process; None where a stage does not record it."""

    stage: str
    seconds: float | None
    processes: int | None
    steps: int | None
    episodes: int | None
    tokens: int | None
    tokens_per_second: float | None
    peak_memory_mib: float | None


@dataclass(frozen=True)
class ReportExample:
    """One test example as the pages show it: its number, prompt, first reference, every system's text, PPO's gain."""

    index: int
    prompt: str
    reference: str
    texts: dict[str, str]
    gain: float = 0.0


@dataclass(frozen=True)
class EvaluationReport:
    """What report.json holds; `references` are the text statistics of the first references, for comparison."""

    systems: dict[str, System]
    comparisons: list[SystemComparison]
    verdict: str
    findings: list[str]
    warnings: list[str]
    settings: dict[str, object]
    references: TextStatistics
    decodings: list[DecodingScores] = field(default_factory=list)
    best_of: dict[str, BestOfN] = field(default_factory=dict)
    gains: Gains | None = None
    cost: list[StageCost] = field(default_factory=list)
    reward_agreement: dict[str, RewardAgreement] = field(default_factory=dict)
    recognition: dict[str, Recognition] = field(default_factory=dict)
    lower_is_better: list[str] = field(default_factory=list)  # metrics that count errors


def score_system(
    outputs: Outputs,
    test: TestSet,
    metrics: Sequence[Metric],
    resampling: Resampling,
    file: str,
    same_weights_as_sft: bool = False,
) -> System:
    """Compute all figures of one system, whose predictions are in `file`."""
    predictions, texts, scores = outputs.predictions, outputs.texts, outputs.scores
    nats, perplexity = cross_entropy(predictions)
    kl, entropy = kl_estimate(outputs.measures), entropy_estimate(outputs.measures)
    applicable = {name: [value for value in values if value == value] for name, values in outputs.rewards.items()}
    return System(
        metrics={metric.name: _score(metric, texts, test, resampling) for metric in metrics},
        mean_reward=_mean(scores) if scores else None,
        cumulative_reward=float(sum(scores)) if scores else None,
        rewards={name: _mean(values) if values else None for name, values in applicable.items()},
        cross_entropy=nats,
        perplexity=perplexity,
        kl_to_sft=None if kl is None else kl.value,
        kl_to_sft_error=None if kl is None else kl.error,
        entropy=entropy.value,
        entropy_error=entropy.error,
        samples=len(outputs.measures),
        sampled_length=_mean([sample.tokens for sample in outputs.measures]),
        length=_mean([len(prediction.completion_ids) for prediction in predictions]),
        finished=_mean([float(prediction.finished) for prediction in predictions]),
        texts=text_statistics(texts, test.first_references, None if test.are_sounds else test.prompts),
        same_weights_as_sft=same_weights_as_sft,
        predictions=file,
    )


def _score(metric: Metric, texts: Sequence[str], test: TestSet, resampling: Resampling) -> Score:
    settings = (resampling.n_resamples, resampling.confidence, resampling.seed)
    if test.clusters is None:
        return metric.corpus_score(texts, test.references, *settings)
    return clustered_score(metric, texts, test.references, test.clusters, *settings)


def compare_systems(
    outputs: Mapping[str, Outputs], test: TestSet, metrics: Sequence[Metric], resampling: Resampling
) -> list[SystemComparison]:
    """Compare the systems by every metric and by the reward, with p corrected for all these comparisons together."""
    settings = (resampling.n_resamples, resampling.seed, test.clusters)
    comparisons = []
    for a, b in compared_pairs(list(outputs)):
        first, second = outputs[a], outputs[b]
        for metric in metrics:
            tests = compare_texts(metric, first.texts, second.texts, test.references, *settings)
            shares = paired_shares(first.metric_scores[metric.name], second.metric_scores[metric.name])
            pair = (a, b, metric.name)
            comparisons.append(_comparison(*pair, metric.higher_is_better, tests, shares, test))
        if first.scores and second.scores:
            tests = compare_values(first.scores, second.scores, *settings)
            shares = paired_shares(first.scores, second.scores)
            comparisons.append(_comparison(a, b, REWARD, True, tests, shares, test))
    corrected = holm([comparison.p_value for comparison in comparisons])
    return [replace(comparison, p_holm=p) for comparison, p in zip(comparisons, corrected, strict=True)]


def _comparison(
    a: str, b: str, metric: str, higher_is_better: bool, tests: PairedTests, shares: Shares, test: TestSet
) -> SystemComparison:
    bootstrap, degrees = tests.bootstrap, max(test.num_clusters - 1, 1)
    return SystemComparison(
        a=a,
        b=b,
        metric=metric,
        delta=bootstrap.delta,
        low=bootstrap.low,
        high=bootstrap.high,
        p_value=tests.p_value,
        p_holm=tests.p_value,
        p_randomisation=tests.p_randomisation,
        wins=shares.wins,
        losses=shares.losses,
        higher_is_better=higher_is_better,
        test=tests.test,
        p_bootstrap=bootstrap.p_value,
        p_better=shares.better,
        examples=len(test.prompts),
        standard_error=bootstrap.standard_error,
        smallest_difference=smallest_difference(bootstrap.standard_error, degrees),
        equivalence_margin=equivalence_margin(bootstrap.delta, bootstrap.standard_error, degrees),
        clusters=test.num_clusters,
    )


def compared_pairs(systems: Sequence[str]) -> list[tuple[str, str]]:
    """List which systems are compared: base and SFT, SFT and PPO, SFT and each further one, others and PPO.

    The others are the control and the baselines. Without SFT the first system is compared with each other one.
    """
    if "sft" not in systems:
        return [(systems[0], name) for name in systems[1:]]
    further = [name for name in systems if name not in ("base", "sft", "ppo", *BASELINES)]
    pairs = [("base", "sft"), ("sft", "ppo"), *[("sft", name) for name in further]]
    pairs += [(name, "ppo") for name in (CONTROL, *BASELINES)]
    return [(a, b) for a, b in pairs if a in systems and b in systems]


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else float("nan")
