"""From a rollout's texts to what PPO is paid for them: rewards asked, prefixes shaped, failures set apart, scaled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.models.text import decode
from pipeline.rewards import Handling, Reward, RewardError, RewardOutputs
from pipeline.rewards.rows import compute_row_rewards
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.rollout import prefix_increments
from pipeline.trainers.ppo.scores import (
    RunningMoments,
    apply_missing_eos_penalty,
    moments_from_sums,
    score_sums,
    transform_scores,
)


@dataclass(frozen=True)
class ProcessedScores:
    """What PPO is paid: `scores [B]`, the same by token `[B, C]`, and the moments of all raw scores so far.

    Where `scored [B]` is False a reward failed, and both are 0. `failures` says what happened, a sentence each.
    """

    scores: Tensor
    token_scores: Tensor
    moments: RunningMoments
    scored: Tensor
    failures: Sequence[str]


def prefix_scores(
    rewards: Sequence[Reward],
    rows: Dataset,
    completions: Sequence[Sequence[int]],
    said: RewardOutputs,
    tokenizer: PreTrainedTokenizerBase,
    handling: Handling,
) -> Tensor:
    """What each token adds to the score of the text so far, [B, C]; the sum over a completion is its score.

    A completion with a prefix that a reward failed on has NaN in its row.

    Raises:
        RewardError: a reward pays single tokens itself.
    """
    if said.token_parts:
        raise RewardError(
            f"reward {next(iter(said.token_parts))!r} pays single tokens itself, which ppo.reward_shaping: prefix "
            "does from scores of whole texts; keep one"
        )
    spans = [(i, t) for i, ids in enumerate(completions) for t in range(1, len(ids))]
    prefixes = [completions[i][:t] for i, t in spans]
    repeated = rows.select([i for i, _ in spans])
    texts = decode(tokenizer, prefixes)
    found = compute_row_rewards(rewards, repeated, texts, prefixes, handling).total if spans else torch.zeros(0)
    return prefix_increments(spans, found, [len(ids) for ids in completions], said.total)


def process_scores(
    said: RewardOutputs,
    token_scores: Tensor,
    lengths: Sequence[int],
    ended: Tensor,
    seen: RunningMoments,
    args: PPOConfig,
    accelerator: Accelerator,
) -> ProcessedScores:
    """Scale, clip and judge what the rewards said; `token_scores [B, C]` sum to `said.total`.

    A score that is missing changes nothing for the others: it counts neither in the moments nor anywhere later.
    """
    scored = said.total.isfinite() & token_scores.isfinite().all(1)
    scores = said.total.masked_fill(~scored, 0.0)
    token_scores = token_scores.masked_fill(~scored.unsqueeze(1), 0.0)
    if args.score_scaling == "running" or (args.score_scaling == "reference" and not seen.count):
        sums = accelerator.reduce(score_sums(scores[scored]).to(accelerator.device), reduction="sum")
        seen = seen.merged(moments_from_sums(sums)) if float(sums[0]) else seen
    deviation = 1.0 if args.score_scaling == "none" else seen.deviation
    scores, token_scores = transform_scores(scores, token_scores, deviation, args.score_clip)
    scores, token_scores = apply_missing_eos_penalty(
        scores, token_scores, ended, torch.tensor(lengths), args.missing_eos_penalty, args.missing_eos_score
    )
    return ProcessedScores(
        scores.masked_fill(~scored, 0.0),
        token_scores.masked_fill(~scored.unsqueeze(1), 0.0),
        seen,
        scored,
        [said.failures[row] for row in sorted(said.failures)],
    )
