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

# TRL's: keeps the scores of a prompt whose completions are nearly equal from growing without bound
GROUP_EPSILON = 1e-4


def estimate_advantages(
    rollout: Rollout, kl_coef: float, args: PPOConfig, accelerator: Accelerator
) -> tuple[Experience, Tensor]:
    """Turn scores and KL into the advantage and the return of each token. Episodes without a score are worth nothing.

    Args:
        rollout: The episodes of this process.
        kl_coef: What one nat of KL costs, in the rewards or in the loss, as `args.kl_placement` says.
        args: How the KL, baselines, scales, GAE and the mean of the loss are computed.
        accelerator: Sums the moments for whitening over processes.

    Returns:
        The experience, and what each token's reward loses for its KL, [B, C].
    """

    def whiten_globally(values: Tensor, shift_mean: bool) -> Tensor:
        moments = accelerator.reduce(masked_moments(values, learnt), reduction="sum")
        return whiten(values, learnt, moments, shift_mean)

    mask = learnt = rollout.mask
    if args.mask_truncated_completions:
        learnt = mask & rollout.finished.to(mask.device).unsqueeze(1)
    kl_penalties = kl_costs(rollout, kl_coef, args)
    rewards = group_token_scores(rollout, kl_penalties, args)
    if args.kl_placement != "score":
        rewards = rewards - kl_penalties
    rewards = rewards * mask
    if args.whiten_rewards:
        rewards = whiten_globally(rewards, shift_mean=False)
    advantages, returns = compute_gae(rewards, rollout.values, mask, args.gamma, args.lam)
    if args.value_lam is not None:
        returns = compute_gae(rewards, rollout.values, mask, args.gamma, args.value_lam)[1]
    if args.scale_rewards == "batch":
        advantages = whiten_globally(advantages, shift_mean=True)
    experience = Experience(
        sequences=rollout.sequences,
        logprobs=rollout.logprobs,
        ref_logprobs=rollout.ref_logprobs,
        values=rollout.values,
        advantages=advantages,
        returns=returns,
        mask=learnt,
        weights=loss_weights(learnt, args.loss_type, args.response_length),
        counts=learnt.sum(1) if args.loss_type == "dapo" else rollout.scored.long(),
        kl_coef=kl_coef if args.kl_placement == "loss" else 0.0,
    )
    return experience, kl_penalties


def kl_costs(rollout: Rollout, kl_coef: float, args: PPOConfig) -> Tensor:
    """What each token's reward loses for its KL, [B, C]: with `kl_placement: score` the last token for all of them."""
    costs = kl_penalty(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    costs = (0.0 if args.kl_placement == "loss" else kl_coef) * costs
    if args.kl_placement == "score":
        mask = rollout.sequences.completion_mask
        costs = spread_scores((costs * mask).sum(1), mask)
    return costs


def group_token_scores(rollout: Rollout, kl_penalties: Tensor, args: PPOConfig) -> Tensor:
    """Compare the token scores [B, C] of each prompt's completions: less a baseline, divided by their deviation."""
    token_scores, mask, size = rollout.token_scores, rollout.sequences.completion_mask, args.num_generations
    if args.kl_placement == "score":
        token_scores = token_scores - kl_penalties
    if not args.group_baseline:
        return token_scores
    compared = subtract_token_baseline(token_scores, rollout.scored, mask, size, args.group_baseline == "mean")
    if args.scale_rewards == "group":
        deviation = group_deviation(token_scores.sum(1), rollout.scored, size)
        compared = compared / (deviation + GROUP_EPSILON).unsqueeze(1)
    return compared


def loss_weights(mask: Tensor, loss_type: str, response_length: int) -> Tensor:
    """What each token [B, C] counts in the loss, whose sum is divided by tokens (dapo) or completions (the others)."""
    weights = mask.float()
    if loss_type == "grpo":
        return weights / mask.sum(1, keepdim=True).clamp(min=1)
    return weights / response_length if loss_type == "dr_grpo" else weights


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


def subtract_group_baseline(scores: Tensor, scored: Tensor, size: int, of_all: bool = False) -> Tensor:
    """Subtract from `scores [B, ...]` the mean of the prompt's other scores; its `size` completions are neighbours.

    A leave-one-out baseline is unbiased, and knows how hard a prompt is (Kool et al. 2019, "Buy 4 REINFORCE samples").
    Only those `scored [B]` count; one that is alone has nothing to compare with and gets 0, as do those without one.
    With `of_all` the mean is that of all the prompt's scores (GRPO), so differences shrink by (n - 1) / n.
    """
    counted = scored.view(-1, size, *[1] * (scores.ndim - 1)).to(scores.dtype)
    groups = scores.view(-1, size, *scores.shape[1:]) * counted
    count = counted.sum(1, keepdim=True) - counted
    others = (groups.sum(1, keepdim=True) - groups) / count.clamp(min=1)
    if of_all:
        others = groups.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return ((groups - others) * counted * (count > 0)).reshape(scores.shape)


def group_deviation(scores: Tensor, scored: Tensor, size: int) -> Tensor:
    """Return for each of `scores [B]` the sample deviation of its prompt's scores; 0 where fewer than two count."""
    counted = scored.view(-1, size).to(scores.dtype)
    count = counted.sum(1, keepdim=True)
    groups = scores.view(-1, size) * counted
    mean = groups.sum(1, keepdim=True) / count.clamp(min=1)
    squares = ((groups - mean) * counted).square().sum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt().expand_as(groups).reshape(scores.shape)


def subtract_token_baseline(
    token_scores: Tensor, scored: Tensor, mask: Tensor, size: int, of_all: bool = False
) -> Tensor:
    """Subtract the group baseline from `token_scores [B, C]`: what is still to come is compared with the others' rest.

    The baseline of a token is the mean of what the others score from that position on, and at least what each of them
    scores with its last token. So scores of whole completions, which are there, are compared as they are, and where
    single tokens score, a position is not better for being early. What others score after the end of a completion
    counts at its last token.
    """
    final = token_scores[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
    centred = subtract_group_baseline(token_scores - spread_scores(final, mask), scored, size, of_all)
    final = subtract_group_baseline(final, scored, size, of_all) + (centred * ~mask).sum(1)
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
    mean = summed / count.clamp(min=1)
    variance = ((squares / count.clamp(min=1) - mean.square()) * count / (count - 1).clamp(min=1)).clamp(min=0)
    mean, scale = mean.to(values), torch.rsqrt(variance + 1e-8).to(values)
    whitened = (values - mean) * scale
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

    The relative error is clipped to +- 0.2, so that `horizon` episodes change the coefficient by 20 % at most, and so
    does a batch of more episodes.
    """
    error = 0.0 if kl != kl else min(0.2, max(-0.2, kl / target - 1))  # no completion had a score
    return kl_coef * (1 + error * min(1.0, episodes / horizon))
