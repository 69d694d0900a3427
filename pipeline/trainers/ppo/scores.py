"""From the rewards of a rollout to the scores that PPO learns from: shaped, scaled, clipped, penalised without EOS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from pipeline.models.generation import Completions
from pipeline.rewards import RewardError, RewardOutputs
from pipeline.runtime.devices import float64_device, in_float64
from pipeline.runtime.seeds import derive_seed
from pipeline.trainers.ppo.config import PPOConfig

# (examples, completions, their token ids) -> what the reward functions return
ComputeRewards = Callable[[Dataset, Sequence[str], Sequence[Sequence[int]]], RewardOutputs]


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and summed squared deviation of numbers seen in several batches (Chan, Golub and LeVeque 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def from_sums(cls, sums: Tensor) -> "RunningMoments":
        """Turn what `masked_moments` returns into moments."""
        count, total, squares = sums.tolist()
        return cls(count, total / count, max(0.0, squares - total**2 / count))

    def merged(self, other: "RunningMoments") -> "RunningMoments":
        """Return the moments of both together."""
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * other.count / count
        squares = self.squares + other.squares + difference**2 * self.count * other.count / count
        return RunningMoments(count, mean, squares)

    @property
    def deviation(self) -> float:
        """The standard deviation of what was seen; 1 while it is 0, so that one may divide by it."""
        deviation = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return deviation if deviation > 1e-8 else 1.0


@dataclass(frozen=True)
class ProcessedScores:
    """What PPO learns from: `scores [B]`, the same spread over tokens `[B, C]`, the moments of all raw scores so far.

    Where `scored [B]` is False a reward failed, and both are 0. `failures` says what happened, a sentence each.
    """

    scores: Tensor
    token_scores: Tensor
    scored: Tensor
    moments: RunningMoments
    failures: Sequence[str]


def process_scores(
    rewards: RewardOutputs,
    token_scores: Tensor,
    completions: Completions,
    seen: RunningMoments,
    args: PPOConfig,
    accelerator: Accelerator,
    seed: int,
) -> ProcessedScores:
    """Scale and clip the weighted sums of the rewards, apply the penalty for a missing EOS, and shuffle if asked to.

    A score that is missing changes nothing for the others: it counts neither in the moments nor anywhere later.

    Args:
        rewards: What the reward functions returned for B completions.
        token_scores: [B, C], whose rows sum to `rewards.weighted_sum`.
        completions: Their lengths, and which of them ended by themselves.
        seen: The moments of all earlier scores, before scaling.
        args: `score_scaling`, `score_clip`, `missing_eos_penalty`, `missing_eos_score`, `shuffle_scores` are read.
        accelerator: Sums moments over processes; its device is that of the result.
        seed: Draws the order of `shuffle_scores`.

    Raises:
        RewardError: scores are to be shuffled, and a reward scores single tokens.
    """
    if args.shuffle_scores and rewards.by_token:
        raise RewardError(
            f"reward {next(iter(rewards.by_token))!r} scores single tokens, and ppo.shuffle_scores needs scores of "
            "whole completions; return one number for each completion"
        )
    scored = rewards.weighted_sum.isfinite() & token_scores.isfinite().all(1)
    scores = rewards.weighted_sum.masked_fill(~scored, 0.0)
    token_scores = token_scores.masked_fill(~scored.unsqueeze(1), 0.0)
    if args.score_scaling == "running" or (args.score_scaling == "reference" and not seen.count):
        sums = masked_moments(scores, scored).to(float64_device(accelerator.device))
        sums = accelerator.reduce(sums, reduction="sum")
        seen = seen.merged(RunningMoments.from_sums(sums)) if float(sums[0]) else seen
    deviation = 1.0 if args.score_scaling == "none" else seen.deviation
    scores, token_scores = transform_scores(scores, token_scores, deviation, args.score_clip)
    lengths = torch.tensor(completions.lengths)
    scores, token_scores = apply_missing_eos_penalty(
        scores, token_scores, completions.finished, lengths, args.missing_eos_penalty, args.missing_eos_score
    )
    if args.soft_punish_cache is not None:
        penalties = overlong_penalties(lengths, args.response_length, args.soft_punish_cache)
        scores = scores - penalties
        token_scores[torch.arange(len(lengths)), lengths - 1] -= penalties
    processed = ProcessedScores(
        scores.masked_fill(~scored, 0.0).to(accelerator.device),
        token_scores.masked_fill(~scored.unsqueeze(1), 0.0).to(accelerator.device),
        scored.to(accelerator.device),
        seen,
        [rewards.failures[row] for row in sorted(rewards.failures)],
    )
    return shuffle_scores(processed, lengths, seed, accelerator) if args.shuffle_scores else processed


def shuffle_scores(
    processed: ProcessedScores, lengths: Tensor, seed: int, accelerator: Accelerator
) -> ProcessedScores:
    """Let the scores of all processes change places, each at the last token of a completion that did not earn it.

    Their distribution stays, and so do scale, groups and whitening, but they say nothing about the completions.
    Completions without a score keep none. The order is the same for any number of processes.
    """
    local = torch.stack([processed.scores, processed.scored.to(processed.scores.dtype)], dim=1)
    scores, scored = accelerator.gather(local).unbind(1)
    rows = scored.nonzero().flatten()
    generator = torch.Generator().manual_seed(derive_seed(seed, "shuffled scores"))
    scores[rows] = scores[rows[torch.randperm(len(rows), generator=generator).to(rows.device)]]
    scores = scores[accelerator.process_index * len(local) :][: len(local)]
    token_scores = torch.zeros_like(processed.token_scores)
    token_scores[torch.arange(len(local)), lengths - 1] = scores
    return replace(processed, scores=scores, token_scores=token_scores)


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """`[count, sum, sum of squares]` of `values` where `mask`, in float64: summed over processes they are global."""
    chosen = in_float64(values[mask])
    return torch.stack([torch.ones_like(chosen).sum(), chosen.sum(), chosen.square().sum()])


def transform_scores(
    scores: Tensor, token_scores: Tensor, deviation: float, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Divide scores [B] by `deviation` and keep them within +- `clip`, and `token_scores [B, C]`, which sum to them.

    A row that is clipped shrinks at every token alike.
    """
    scores, token_scores = scores / deviation, token_scores / deviation
    if clip is not None:
        factor = (clip / scores.abs().clamp(min=1e-12)).clamp(max=1.0)
        scores, token_scores = scores * factor, token_scores * factor.unsqueeze(1)
    return scores, token_scores


def apply_missing_eos_penalty(
    scores: Tensor,
    token_scores: Tensor,
    finished: Tensor,
    lengths: Tensor,
    penalty: float | None,
    score: float | None,
) -> tuple[Tensor, Tensor]:
    """Lower scores [B] and token scores [B, C] of completions that did not end by themselves.

    Either `penalty` is subtracted at the last token, or `score` replaces the whole score (Huang et al. 2024,
    arXiv:2403.17031, section 3.4: an unfinished text has no score worth learning from).
    """
    unfinished, rows, last = ~finished, torch.arange(len(scores)), lengths - 1
    scores, token_scores = scores.clone(), token_scores.clone()
    if penalty is not None and score is None:
        scores -= penalty * unfinished
        token_scores[rows, last] -= penalty * unfinished
    if score is not None:
        scores[unfinished] = score
        token_scores[unfinished] = 0.0
        token_scores[rows[unfinished], last[unfinished]] = score
    return scores, token_scores


def overlong_penalties(lengths: Tensor, longest: int, cache: int) -> Tensor:
    """Return what completions of these lengths [B] lose: 0 up to `cache` tokens below the longest, then up to 1.

    This is the soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13).
    """
    return ((lengths - (longest - cache)) / cache).clamp(min=0.0, max=1.0)


def prefix_scores(
    rewards: RewardOutputs,
    completions: Completions,
    examples: Dataset,
    decode: Callable[[Sequence[Sequence[int]]], list[str]],
    compute_rewards: ComputeRewards,
) -> tuple[RewardOutputs, Tensor]:
    """What each token adds to the score of the text so far, [B, C]; the sum over a completion is its score.

    A completion with a prefix that a reward failed on has NaN in its row where failures are skipped. The rewards are
    returned with the first such failure of each completion among theirs.

    Raises:
        RewardError: a reward scores single tokens itself.
    """
    completion_ids = completions.ids
    if rewards.by_token:
        raise RewardError(
            f"reward {next(iter(rewards.by_token))!r} scores single tokens itself, which ppo.reward_shaping: prefix "
            "does from scores of whole texts; keep one"
        )
    spans = [(row, end) for row, ids in enumerate(completion_ids) for end in range(1, len(ids))]
    prefixes = [completion_ids[row][:end] for row, end in spans]
    potentials = torch.zeros(0)
    if spans:
        repeated = examples.select([row for row, _ in spans])
        outputs = compute_rewards(repeated, decode(prefixes), prefixes)
        potentials = outputs.weighted_sum
        of_prefixes = {spans[n][0]: outputs.failures[n] for n in sorted(outputs.failures, reverse=True)}
        rewards = replace(rewards, failures=of_prefixes | dict(rewards.failures))
    lengths = [len(ids) for ids in completion_ids]
    return rewards, prefix_increments(spans, potentials, lengths, rewards.weighted_sum)


def prefix_increments(
    spans: Sequence[tuple[int, int]], potentials: Tensor, lengths: Sequence[int], scores: Tensor
) -> Tensor:
    """What each token adds to the score of the text so far, [B, C], 0 after the end.

    `potentials[n]` is the score of the first `spans[n][1]` tokens of episode `spans[n][0]`; `scores [B]` those of the
    whole texts; nothing written scores 0. This is potential-based shaping (Ng et al. 1999): with gamma 1 the best
    policy stays the same, and a token is rewarded where it counts (Bahdanau et al. 2017, arXiv:1607.07086).
    """
    ends = torch.tensor(lengths)
    table = torch.zeros(len(lengths), int(ends.max()) + 1)
    if spans:
        index = torch.tensor(spans)
        table[index[:, 0], index[:, 1]] = potentials
    table[torch.arange(len(lengths)), ends] = scores
    return (table[:, 1:] - table[:, :-1]) * (torch.arange(table.shape[1] - 1) < ends.unsqueeze(1))
