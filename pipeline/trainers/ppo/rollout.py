"""What one PPO step collects and learns from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.sequences import Sequences
from pipeline.models.shared import SharedModel
from pipeline.runtime.seeds import derive_seed
from pipeline.trainers.ppo.scores import RunningMoments, prompts_with_equal_scores


@dataclass(frozen=True)
class Rollout:
    """One batch of episodes on this process, before any update.

    `logprobs, ref_logprobs, values, entropies [B, C]`; `scores [B]` is the weighted sum of the rewards, and
    `token_scores [B, C]` what each token is paid of it (all at the last token without shaping);
    `rewards` has each reward's own values [B] by name, NaN where a function had nothing to say. `moments` are those of
    all scores so far, before scaling. `scored [B]` is False for episodes that nothing is learnt from, because a reward
    failed on them: they stand in the batch with a score of 0 and count nowhere. `failures` are all such sentences.
    """

    prompts: Sequence[object]
    completions: Sequence[str]
    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    scores: Tensor
    token_scores: Tensor
    rewards: dict[str, Tensor]
    finished: Tensor
    moments: RunningMoments
    scored: Tensor
    failures: Sequence[str]

    @property
    def mask(self) -> Tensor:
        """The tokens that are learnt from, [B, C]."""
        return self.sequences.completion_mask & self.scored.unsqueeze(1)


@dataclass(frozen=True)
class Experience:
    """What the update needs: `logprobs, ref_logprobs, values, advantages, returns [B, C]` beside the sequences.

    `mask [B, C]` is True on the tokens that are learnt from, which are those of the episodes that have a score.
    """

    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> "Experience":
        """The episodes at `index`, trimmed to the longest of them."""
        sequences = self.sequences.rows(index)
        width = sequences.completion_ids.shape[1]
        every = (self.logprobs, self.ref_logprobs, self.values, self.advantages, self.returns, self.mask)
        parts = (part[index, :width] for part in every)
        return Experience(sequences, *parts)

    def mini_batches(self, count: int, generator: torch.Generator) -> list["Experience"]:
        """The episodes in `count` random mini-batches. With one, the order stays: it would only change rounding."""
        if count == 1:
            return [self]
        order = torch.randperm(len(self.sequences), generator=generator).to(self.logprobs.device)
        return [self.rows(part) for part in order.chunk(count)]

    def micro_batches(self, size: int) -> list["Experience"]:
        """At most `size` episodes at a time, alike in length and trimmed, so that little of it is padding."""
        return [self.rows(index) for index in self.sequences.chunks(size)]

    @property
    def num_tokens(self) -> int:
        """Tokens that are learnt from."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class TokenOutputs:
    """What the models compute for each completion token before the update: all [B, C], without gradients."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor


@torch.no_grad()
def compute_token_outputs(model: SharedModel, sequences: Sequences, size: int) -> TokenOutputs:
    """Compute policy, reference and value of every token, in the micro-batches of at most `size` of the update.

    The same rows together give the same rounding, so that the update's first ratio is exactly 1.
    """
    chunks = sequences.chunks(size)
    parts = [sequences.rows(index) for index in chunks]
    outputs = [model(part) for part in parts]
    shape = sequences.completion_mask.shape
    logprobs, values, entropies, ref_logprobs = (
        _in_place(tensors, chunks, shape)
        for tensors in (
            [output.logprobs for output in outputs],
            [output.values for output in outputs],
            [output.entropies for output in outputs],
            model.reference_logprobs(*parts),
        )
    )
    return TokenOutputs(logprobs, ref_logprobs, values, entropies)


def _in_place(parts: Sequence[Tensor], chunks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Trimmed results of chunks of rows, back where their rows stand in a batch of `shape`."""
    result = parts[0].new_zeros(shape)
    for part, index in zip(parts, chunks, strict=True):
        result[index, : part.shape[1]] = part
    return result


STATISTICS = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/length",
    "objective/finished",
)


def rollout_sums(rollout: Rollout, returns: Tensor, penalties: Tensor, generations: int) -> Tensor:
    """Sums over this process's scored episodes, in float64, that `rollout_statistics` turns into means when added up.

    `penalties [B, C]` is what each token pays for its KL, which itself is the k1 estimate, unbiased whatever is paid;
    `generations` neighbouring rows answer one prompt.
    """
    mask, scored = rollout.mask, rollout.scored
    kl = ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(1)
    penalty = -(penalties * mask).sum(1)
    entropy = (rollout.entropies * mask).sum(1)
    finished = rollout.finished.to(kl.device).float() * scored
    per_episode = (rollout.scores, kl, entropy, penalty, rollout.scores + penalty, mask.sum(1), finished)
    sums = [scored.sum()] + [values.double().sum() for values in per_episode]
    sums.append(rollout.scores.double().square().sum())
    sums += prompts_with_equal_scores(rollout.scores, scored, generations)
    sums.append(torch.tensor(len(rollout.failures)))
    error = (returns - rollout.values)[mask].double()
    chosen = returns[mask].double()
    sums += [error.sum(), error.square().sum(), chosen.sum(), chosen.square().sum(), mask.sum()]
    for values in rollout.rewards.values():
        sums += [values.nan_to_num(0.0).double().sum(), (~values.isnan()).sum()]
    return torch.stack([value.double().cpu() for value in sums])


def rollout_statistics(sums: Sequence[float], rewards: Sequence[str], generations: int) -> dict[str, float]:
    """Means over the episodes of all processes, under TRL's names; KL and entropy are nats per episode."""
    episodes, means, square = sums[0], sums[1 : 1 + len(STATISTICS)], sums[1 + len(STATISTICS)]
    stats = {name: value / episodes for name, value in zip(STATISTICS, means, strict=True)}
    stats["objective/scores_std"] = max(0.0, square / episodes - stats["objective/scores"] ** 2) ** 0.5
    flat, prompts, stats["objective/reward_errors"] = sums[2 + len(STATISTICS) : 5 + len(STATISTICS)]
    # With one completion of each prompt, the batch over all processes is compared: all of them are flat, or none.
    equal = stats["objective/scores_std"] <= 1e-6 * max(1.0, abs(stats["objective/scores"]))
    stats["objective/frac_reward_zero_std"] = flat / prompts if generations > 1 and prompts else float(equal)
    error, error_square, value, value_square, tokens = sums[5 + len(STATISTICS) : 10 + len(STATISTICS)]
    variance = value_square / tokens - (value / tokens) ** 2
    residual = error_square / tokens - (error / tokens) ** 2
    stats["val/explained_variance"] = 1 - residual / variance if variance > 1e-12 else 0.0
    rest = sums[10 + len(STATISTICS) :]
    for number, name in enumerate(rewards):
        total, count = rest[2 * number : 2 * number + 2]
        stats[f"reward/{name}"] = total / count if count else float("nan")
    return stats


def prefix_increments(
    spans: Sequence[tuple[int, int]], potentials: Tensor, lengths: Sequence[int], scores: Tensor
) -> Tensor:
    """What each token adds to the score of the text so far, [B, C], 0 behind the end.

    `potentials[n]` is the score of the first `spans[n][1]` tokens of episode `spans[n][0]`; `scores [B]` those of the
    whole texts; nothing written scores 0. This is potential-based shaping (Ng et al. 1999): with gamma 1 the best
    policy stays the same, and a token is paid where it counts (Bahdanau et al. 2017, arXiv:1607.07086).
    """
    ends = torch.tensor(lengths)
    table = torch.zeros(len(lengths), int(ends.max()) + 1)
    if spans:
        index = torch.tensor(spans)
        table[index[:, 0], index[:, 1]] = potentials
    table[torch.arange(len(lengths)), ends] = scores
    return (table[:, 1:] - table[:, :-1]) * (torch.arange(table.shape[1] - 1) < ends.unsqueeze(1))


def prompt_order(size: int, seed: int) -> Callable[[int], int]:
    """`position -> row`: every epoch is a new permutation of `size` rows, drawn from `seed` and the epoch alone.

    Nothing has to be saved to go on at a position after a restart.
    """
    cache: dict[int, list[int]] = {}

    def row(position: int) -> int:
        epoch, offset = divmod(position, size)
        if epoch not in cache:
            for old in [e for e in cache if e < epoch - 1]:
                del cache[old]
            generator = torch.Generator().manual_seed(derive_seed(seed, "prompt order", epoch))
            cache[epoch] = torch.randperm(size, generator=generator).tolist()
        return cache[epoch][offset]

    return row
