"""From a rollout to what each of its tokens is worth: KL, group baseline, GAE, whitening over all processes.

Shapes: `B` episodes, `C` completion tokens. `mask [B, C]` is True on real tokens.
Sources: Schulman et al. 2016 for GAE (arXiv:1506.02438); Ziegler et al. 2019 for the KL penalty in the reward
(arXiv:1909.08593).
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.objective import kl_penalty
from pipeline.trainers.ppo.rollout import Experience, Rollout
from pipeline.trainers.ppo.scores import masked_moments


def estimate_advantages(
    rollout: Rollout, kl_coef: float, args: PPOConfig, accelerator: Accelerator
) -> tuple[Experience, Tensor]:
    """Turn scores and KL into the advantage and the return of each token. Episodes without a score are worth nothing.

    Args:
        rollout: The episodes of this process.
        kl_coef: What one nat of KL costs, in the rewards or in the loss, as `args.kl_placement` says.
        args: The estimator of KL, `group_baseline`, `gamma`, `lam` and the two `whiten_...` are read.
        accelerator: Sums the moments for whitening over processes.

    Returns:
        The experience, and what each token's reward loses for its KL, [B, C].
    """

    def whiten_globally(values: Tensor, shift_mean: bool) -> Tensor:
        moments = accelerator.reduce(masked_moments(values, mask), reduction="sum")
        return whiten(values, mask, moments, shift_mean)

    mask, token_scores, in_rewards = rollout.mask, rollout.token_scores, args.kl_placement == "reward"
    kl_penalties = kl_penalty(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    kl_penalties = (kl_coef if in_rewards else 0.0) * kl_penalties
    if args.group_baseline:
        completion_mask = rollout.sequences.completion_mask
        token_scores = subtract_token_baseline(token_scores, rollout.scored, completion_mask, args.num_generations)
    rewards = (token_scores - kl_penalties) * mask
    if args.whiten_rewards:
        rewards = whiten_globally(rewards, shift_mean=False)
    advantages, returns = compute_gae(rewards, rollout.values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten_globally(advantages, shift_mean=True)
    experience = Experience(
        sequences=rollout.sequences,
        logprobs=rollout.logprobs,
        ref_logprobs=rollout.ref_logprobs,
        values=rollout.values,
        advantages=advantages,
        returns=returns,
        mask=mask,
        kl_coef=0.0 if in_rewards else kl_coef,
    )
    return experience, kl_penalties


def compute_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with value 0 after the last real token.

    Args:
        rewards: [B, C], 0 where masked.
        values: [B, C].
        mask: [B, C], True on real tokens.
        gamma: The discount of a token.
        lam: The weight of longer estimates; 1 is the return less the value.

    Returns:
        Advantages and returns, both [B, C], 0 where masked.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    last_gae = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(last_gae)
    for t in reversed(range(rewards.shape[1])):
        # delta_t = r_t + gamma * V(s_t+1) - V(s_t)
        # A_t = delta_t + gamma * lambda * A_t+1
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # After the end everything is 0, so the last real token sees a next value and advantage of 0.
        last_gae = (delta + gamma * lam * last_gae) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = last_gae
    return advantages, advantages + values


def subtract_group_baseline(scores: Tensor, scored: Tensor, size: int) -> Tensor:
    """Subtract from `scores [B, ...]` the mean of the prompt's other scores; its `size` completions are neighbours.

    A leave-one-out baseline is unbiased, and knows how hard a prompt is (Kool et al. 2019, "Buy 4 REINFORCE samples").
    Only those `scored [B]` count; one that is alone has nothing to compare with and gets 0, as do those without one.
    """
    known = scored.view(-1, size, *[1] * (scores.ndim - 1)).to(scores.dtype)
    groups = scores.view(-1, size, *scores.shape[1:]) * known
    count = known.sum(1, keepdim=True) - known
    others = (groups.sum(1, keepdim=True) - groups) / count.clamp(min=1)
    return ((groups - others) * known * (count > 0)).reshape(scores.shape)


def subtract_token_baseline(token_scores: Tensor, scored: Tensor, mask: Tensor, size: int) -> Tensor:
    """Subtract the group baseline from `token_scores [B, C]`: what is still to come is compared with the others' rest.

    The baseline of a token is the mean of what the others score from that position on, and at least what each of them
    scores with its last token. So scores of whole completions, which are there, are compared as they are, and where
    single tokens score, a position is not better for being early. What others score after the end of a completion
    counts at its last token.
    """
    final = token_scores[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
    centred = subtract_group_baseline(token_scores - spread_scores(final, mask), scored, size)
    final = subtract_group_baseline(final, scored, size) + (centred * ~mask).sum(1)
    return centred * mask + spread_scores(final, mask)


def spread_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Put `scores [B]` at each episode's last real token, 0 elsewhere: [B, C]."""
    spread = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    spread[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1] = scores
    return spread


def whiten(values: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool = True) -> Tensor:
    """Give `values [B, C]` unit variance, and mean 0 unless `shift_mean` is False; 0 where masked.

    `moments` are those of `masked_moments`, summed over processes.
    """
    count, summed, squares = moments
    mean = summed / count
    variance = ((squares / count - mean.square()) * count / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return (whitened * mask).to(values.dtype)


def next_kl_coef(args: PPOConfig, kl_coef: float, kl: float, episodes: int) -> float | None:
    """Return the KL coefficient after a batch of `episodes` with a KL of `kl`; None where it stays the setting."""
    if args.kl_target is None:
        return None
    return adapt_kl_coef(kl_coef, kl, args.kl_target, episodes, args.kl_horizon)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Move the KL coefficient after a batch whose KL was `kl` nats per episode (Ziegler et al. 2019, section 2.2).

    The relative error is clipped to +- 0.2, so that `horizon` episodes change the coefficient by 20 % at most.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)
