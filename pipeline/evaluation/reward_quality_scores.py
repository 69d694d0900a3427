"""Choose the texts a reward model is evaluated on, and score them: pairs, held-out texts, references."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.evaluation.reward_quality import (
    RewardReport,
    ScoredPair,
    ScoredText,
    consensus,
    evaluate_reward_model,
)
from pipeline.metrics import Metric
from pipeline.models.prompt_lengths import truncate_prompts
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.rewards.learned import calibration
from pipeline.rewards.pairs import CHOICE, HELD_OUT, TRAIN, Pair, prompt_key
from pipeline.rewards.pairs.collect import RankedSample
from pipeline.rewards.raw_scores import UncalibratedReward, gather_raw_scores

TRAINING_PAIRS, REFERENCES = 1000, 1000  # at most so many are scored


@dataclass(frozen=True)
class PromptText:
    """A text of the prompt in `row` of the validation split, and the token ids it is scored by."""

    row: int
    prompt: str | list
    text: str
    ids: list[int]


@dataclass(frozen=True)
class RewardTestData:
    """What a reward model is evaluated on: held-out pairs, some training pairs, held-out texts, references.

    Rows in `choice_rows` helped to choose the checkpoint, so their texts give the scale but no figure of the report.
    `ppo_prompts` has the key of every prompt that PPO answers.
    """

    held_out: list[Pair]
    training: list[Pair]
    texts: list[PromptText]
    references: list[PromptText]
    choice_rows: frozenset[int]
    ppo_prompts: frozenset[str]


@dataclass(frozen=True)
class RawScores:
    """The raw scores of a `RewardTestData`: of pairs [N, 2], chosen and rejected; of texts and references [N]."""

    held_out: Tensor
    training: Tensor
    texts: Tensor
    references: Tensor


@dataclass(frozen=True)
class ReportInputs:
    """What the report needs besides scores.

    `metrics` are compared with the scores of held-out texts, whose `references` are those of every row of the
    validation split (None: there are none). `consensus_metric` is that of `scored_pairs`, `min_accuracy` the held-out
    accuracy that PPO asks for; `pair_counts` and `settings` are shown.
    """

    metrics: Sequence[Metric]
    references: Sequence[Sequence[str]] | None
    consensus_metric: Metric | None
    min_accuracy: float
    pair_counts: Mapping[str, object]
    settings: Mapping[str, object]


def reward_test_data(
    pairs: Sequence[Pair],
    samples: Sequence[RankedSample],
    validation: Dataset,
    ppo_prompts: Sequence[str | list],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    config: PretrainedConfig,
) -> RewardTestData:
    """Choose what is scored: the held-out samples, or without any the texts of the held-out pairs.

    References are cut where a model of `config` reads no further.
    """
    training = [pair for pair in pairs if pair.split == TRAIN]
    held_out = [pair for pair in pairs if pair.split == HELD_OUT]
    choice = [pair for pair in pairs if pair.split == CHOICE]
    if samples:
        prompts = validation.select([sample.row for sample in samples])["prompt"]
        texts = [PromptText(s.row, prompt, s.text, s.ids) for s, prompt in zip(samples, prompts, strict=True)]
    else:
        pairs = [*held_out, *choice]
        sides = [(p, *side) for p in pairs for side in ((p.chosen, p.chosen_ids), (p.rejected, p.rejected_ids))]
        distinct = {(p.row, text): PromptText(p.row, p.prompt, text, ids) for p, text, ids in sides}
        texts = list(distinct.values())
    first = validation.select(range(min(REFERENCES, len(validation))))
    references = [references[0] for references in first["references"]]
    asked = encode_prompts(tokenizer, first["prompt"], config.is_encoder_decoder)
    ids, _ = truncate_prompts(asked, encode_completions(tokenizer, first["prompt"], references), config)
    return RewardTestData(
        held_out,
        random.Random(seed).sample(training, min(TRAINING_PAIRS, len(training))),
        texts,
        [PromptText(*values) for values in zip(range(len(first)), first["prompt"], references, ids, strict=True)],
        frozenset(pair.row for pair in choice),
        frozenset(prompt_key(prompt) for prompt in ppo_prompts),
    )


def score_test_data(reward: UncalibratedReward, data: RewardTestData, batch_size: int) -> RawScores:
    """Score everything, every process its share; all scores on every process."""
    return RawScores(
        _pair_scores(reward, data.held_out, batch_size),
        _pair_scores(reward, data.training, batch_size),
        _text_scores(reward, data.texts, batch_size),
        _text_scores(reward, data.references, batch_size),
    )


def _pair_scores(reward: UncalibratedReward, pairs: Sequence[Pair], batch_size: int) -> Tensor:
    sides = [PromptText(p.row, p.prompt, p.chosen, p.chosen_ids) for p in pairs]
    sides += [PromptText(p.row, p.prompt, p.rejected, p.rejected_ids) for p in pairs]
    return _text_scores(reward, sides, batch_size).view(2, -1).T


def _text_scores(reward: UncalibratedReward, texts: Sequence[PromptText], batch_size: int) -> Tensor:
    prompts, words, ids = [t.prompt for t in texts], [t.text for t in texts], [t.ids for t in texts]
    return gather_raw_scores(reward, prompts, words, ids, batch_size)


def scored_pairs(
    pairs: Sequence[Pair], scores: Tensor, metric: Metric | None, ppo_prompts: Collection[str]
) -> list[ScoredPair]:
    """Join pairs with their raw scores `[N, 2]` and with what trivial rules compare; equal prompts have one number.

    With a `metric`, one rule compares the agreement of a text with the prompt's other texts. (Among samples and a
    reference, the reference would be one of the texts.)
    """
    agreement: list[dict[str, tuple[float, float]]] = [{} for _ in pairs]
    if metric is not None:
        agreement = consensus([(pair.row, pair.chosen, pair.rejected) for pair in pairs], metric)
    keys = [prompt_key(pair.prompt) for pair in pairs]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [
        ScoredPair(numbers[key], *raw, len(pair.chosen), len(pair.rejected), others, key in ppo_prompts)
        for pair, key, raw, others in zip(pairs, keys, scores.tolist(), agreement, strict=True)
    ]


def scored_texts(
    texts: Sequence[PromptText], scores: Tensor, references: Sequence[Sequence[str]] | None, metrics: Sequence[Metric]
) -> list[ScoredText]:
    """Join texts with their raw scores `[N]` and, where every row has `references`, with sentence scores."""
    values: dict[str, list[float]] = {}
    if references is not None:
        wanted = [references[text.row] for text in texts]
        values = {metric.name: metric.sample_scores([text.text for text in texts], wanted) for metric in metrics}
    return [
        ScoredText(text.row, score, len(text.ids), {name: column[i] for name, column in values.items()})
        for i, (text, score) in enumerate(zip(texts, scores.tolist(), strict=True))
    ]


def reward_report(
    data: RewardTestData, scores: RawScores, inputs: ReportInputs
) -> tuple[RewardReport, list[ScoredPair]]:
    """Calibrate and evaluate a reward model; return the report and the held-out pairs with their raw scores.

    Raises:
        ValueError: as `calibration`.
    """
    held_out = scored_pairs(data.held_out, scores.held_out, inputs.consensus_metric, data.ppo_prompts)
    texts = scored_texts(data.texts, scores.texts, inputs.references, inputs.metrics)
    report = evaluate_reward_model(
        held_out,
        scored_pairs(data.training, scores.training, inputs.consensus_metric, data.ppo_prompts),
        [text for text in texts if text.prompt not in data.choice_rows],
        calibration(scores.texts, scores.references),
        inputs.min_accuracy,
        dict(inputs.pair_counts),
        dict(inputs.settings),
    )
    return report, held_out
