"""From what the rewards said to what PPO is paid: scaling, clipping, unfinished completions, groups without signal."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and summed squared deviation of numbers seen in several batches (Chan, Golub and LeVeque 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, other: "RunningMoments") -> "RunningMoments":
        """The moments of both together."""
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


def score_sums(scores: Tensor) -> Tensor:
    """`[count, sum, sum of squares]` of scores [B] in float64; summed over processes: see `moments_from_sums`."""
    scores = scores.double()
    return torch.stack([torch.tensor(float(len(scores)), dtype=torch.float64), scores.sum(), scores.square().sum()])


def moments_from_sums(sums: Tensor) -> RunningMoments:
    """The moments behind `score_sums`."""
    count, total, squares = sums.tolist()
    return RunningMoments(count, total / count, max(0.0, squares - total**2 / count))


def transform_scores(
    scores: Tensor, token_scores: Tensor, deviation: float, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Scores [B] divided by `deviation` and kept within +- `clip`, and `token_scores [B, C]`, which sum to them.

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
    """Scores [B] and token scores [B, C] where a completion that did not end by itself pays.

    Either `penalty` is subtracted at its last token, or `score` replaces all it was paid (Huang et al. 2024,
    arXiv:2403.17031, section 3.4: an unfinished text has no score worth learning from).
    """
    unfinished, rows, last = ~finished, torch.arange(len(scores)), lengths - 1
    scores, token_scores = scores.clone(), token_scores.clone()
    if penalty is not None:
        scores -= penalty * unfinished
        token_scores[rows, last] -= penalty * unfinished
    if score is not None:
        scores[unfinished] = score
        token_scores[unfinished] = 0.0
        token_scores[rows[unfinished], last[unfinished]] = score
    return scores, token_scores


def prompts_with_equal_scores(scores: Tensor, scored: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many prompts have equal scores throughout, and how many there are, of `size` neighbouring rows each.

    Such a prompt teaches nothing (Razin et al. 2024, arXiv:2310.20703). `scores [B]` count where `scored [B]`.
    """
    groups, known = scores.view(-1, size), scored.view(-1, size)
    highest = groups.masked_fill(~known, -torch.inf).amax(1)
    lowest = groups.masked_fill(~known, torch.inf).amin(1)
    there = known.any(1)
    return (there & (highest - lowest <= 1e-8)).sum(), there.sum()
