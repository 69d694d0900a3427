"""PPO's arithmetic on tensors: nothing here knows a model, a text or a config.

Shapes: `B` episodes, `C` completion tokens. `mask [B, C]` is True on real tokens. Sums run over real tokens only.
Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347) and 2016 (GAE, arXiv:1506.02438); Ziegler et al. 2019 for the
KL penalty in the reward (arXiv:1909.08593).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is 5e8: beyond that a ratio says only that something broke, and would overflow in the loss.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Clipping:
    """How far an update may move: ratios within [1 - low, 1 + high], values within +- `value` of the old ones.

    `dual` bounds what a token with a negative advantage can cost, whose ratio is otherwise unbounded above (Ye et al.
    2020, arXiv:1912.09729). `high` above `low` leaves unlikely tokens room to grow (Yu et al. 2025, arXiv:2503.14476).
    """

    low: float = 0.2
    high: float = 0.2
    value: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class LossTerms:
    """Sums over the tokens of a micro-batch, to be divided by the tokens of the whole mini-batch.

    `policy`, `value`, `entropy` and `reference_kl` carry gradients; the rest are statistics.
    """

    policy: Tensor
    value: Tensor
    entropy: Tensor
    reference_kl: Tensor
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
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def subtract_group_baseline(scores: Tensor, scored: Tensor, size: int) -> Tensor:
    """`scores [B]` less the mean of the other scores of the same prompt, whose `size` completions are neighbours.

    A leave-one-out baseline is unbiased, and knows how hard a prompt is (Kool et al. 2019, "Buy 4 REINFORCE samples").
    Only those `scored [B]` count; one that is alone has nothing to compare with and gets 0, as do those without one.
    """
    known = scored.view(-1, size).to(scores.dtype)
    groups = scores.view(-1, size) * known
    count = known.sum(1, keepdim=True) - known
    others = (groups.sum(1, keepdim=True) - groups) / count.clamp(min=1)
    return ((groups - others) * known * (count > 0)).reshape(-1)


def spread_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """`scores [B]` at each episode's last real token, 0 elsewhere. [B, C]."""
    spread = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    spread[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1] = scores
    return spread


def token_rewards(token_scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """`token_scores - kl_coef * kl` at each real token, 0 elsewhere. All [B, C]."""
    return (token_scores - kl_coef * kl) * mask


def compute_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
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
    values: Tensor,
    entropies: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    clipping: Clipping,
) -> LossTerms:
    """The clipped surrogate, the clipped value loss, entropy and KL to the reference (k3), summed over real tokens.

    All inputs [B, C]. The first three carry gradients.
    """
    log_ratio = ((logprobs - old_logprobs) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clipping.low, 1.0 + clipping.high)
    policy = torch.maximum(unclipped, clipped)
    if clipping.dual is not None:
        policy = torch.where(advantages < 0, torch.minimum(policy, -advantages * clipping.dual), policy)
    bounded = torch.minimum(torch.maximum(values, old_values - clipping.value), old_values + clipping.value)
    value_unclipped = (values - returns).square()
    value_clipped = (bounded - returns).square()
    weights = mask.to(logprobs.dtype)
    return LossTerms(
        policy=(policy * weights).sum(),
        value=0.5 * (torch.maximum(value_unclipped, value_clipped) * weights).sum(),
        entropy=(entropies * weights).sum(),
        reference_kl=(kl_penalty(logprobs * mask, ref_logprobs * mask, "k3") * weights).sum(),
        approx_kl=(0.5 * log_ratio.detach().square() * weights).sum(),
        policy_clipped=((policy != unclipped) * weights).sum(),
        value_clipped=((value_clipped > value_unclipped) * weights).sum(),
        ratio=(ratio.detach() * weights).sum(),
    )


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The KL coefficient after a batch whose KL was `kl` nats per episode (Ziegler et al. 2019, section 2.2).

    The relative error is clipped to +- 0.2, so that `horizon` episodes change the coefficient by 20 % at most.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)
