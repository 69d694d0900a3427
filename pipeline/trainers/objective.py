"""PPO's arithmetic on tensors: nothing here knows a model, a text or a config.

Shapes: `B` episodes, `C` completion tokens. `mask [B, C]` is True on real tokens. Sums run over real tokens only.
Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347) and 2016 (GAE, arXiv:1506.02438); Ziegler et al. 2019 for the
KL penalty in the reward (arXiv:1909.08593).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """Sums over the tokens of a micro-batch, to be divided by the tokens of the whole mini-batch."""

    policy: Tensor
    value: Tensor
    approx_kl: Tensor
    policy_clipped: Tensor
    value_clipped: Tensor
    ratio: Tensor


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) estimated at each sampled token [B, C], in nats (Schulman, "Approximating KL", 2020).

    `k1` is unbiased, with either sign; `k3` is never negative and has less variance.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    return torch.expm1(log_ratio) - log_ratio


def subtract_group_baseline(scores: Tensor, size: int) -> Tensor:
    """`scores [B]` less the mean of the other scores of the same prompt, whose `size` completions are neighbours.

    A leave-one-out baseline is unbiased, and knows how hard a prompt is (Kool et al. 2019, "Buy 4 REINFORCE samples").
    """
    groups = scores.view(-1, size)
    others = (groups.sum(1, keepdim=True) - groups) / (size - 1)
    return (groups - others).reshape(-1)


def spread_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """`scores [B]` at each episode's last real token, 0 elsewhere. [B, C]."""
    spread = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    spread[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1] = scores
    return spread


def token_rewards(token_scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """`token_scores - kl_coef * kl` at each real token, 0 elsewhere. All [B, C]."""
    return (token_scores - kl_coef * kl) * mask


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with value 0 after the last real token. Both [B, C], 0 where masked."""
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        # Behind the end everything is 0, so the last real token sees a following value and advantage of 0.
        running = (delta + gamma * lam * running) * mask[:, t]
        following = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """`[count, sum, sum of squares]` of the real tokens, in float64: summed over processes they are global moments."""
    chosen = values[mask].double()
    return torch.stack(
        [
            torch.tensor(float(chosen.numel()), device=values.device, dtype=torch.float64),
            chosen.sum(),
            chosen.square().sum(),
        ]
    )


def whiten(values: Tensor, mask: Tensor, total: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit variance, and mean 0 unless `shift_mean` is False, by the global moments `total`; 0 where masked."""
    count, summed, squares = total
    mean = summed / count
    variance = ((squares / count - mean.square()) * count / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return (whitened * mask).to(values.dtype)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float,
    cliprange_value: float,
) -> LossTerms:
    """The clipped surrogate and the clipped value loss, summed over real tokens. All inputs [B, C]."""
    # exp(20) is 5e8: beyond that a ratio says only that something broke, and would overflow in the loss.
    log_ratio = ((logprobs - old_logprobs) * mask).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    bounded = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
    value_unclipped = (values - returns).square()
    value_clipped = (bounded - returns).square()
    weights = mask.to(logprobs.dtype)
    return LossTerms(
        policy=(torch.maximum(unclipped, clipped) * weights).sum(),
        value=0.5 * (torch.maximum(value_unclipped, value_clipped) * weights).sum(),
        approx_kl=(0.5 * log_ratio.detach().square() * weights).sum(),
        policy_clipped=((clipped > unclipped) * weights).sum(),
        value_clipped=((value_clipped > value_unclipped) * weights).sum(),
        ratio=(ratio.detach() * weights).sum(),
    )
