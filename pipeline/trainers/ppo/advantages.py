"""From a rollout to what each of its tokens is worth: KL, groups, advantages, whitening over all processes."""

from accelerate import Accelerator
from torch import Tensor

from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.objective import (
    compute_gae,
    kl_penalty,
    masked_moments,
    spread_scores,
    subtract_group_baseline,
    token_rewards,
    whiten,
)
from pipeline.trainers.ppo.rollout import Experience, Rollout


def credit(rollout: Rollout, args: PPOConfig, kl_coef: float, accelerator: Accelerator) -> tuple[Experience, Tensor]:
    """What is learnt from, and what each token pays for its KL, [B, C]. Episodes without a score are worth nothing."""

    def total(values: Tensor) -> Tensor:
        return accelerator.reduce(masked_moments(values, mask), reduction="sum")

    mask, token_scores = rollout.mask, rollout.token_scores
    kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    if args.group_baseline:
        centred = subtract_group_baseline(rollout.scores, rollout.scored, args.num_generations)
        token_scores = token_scores + spread_scores(centred - rollout.scores, rollout.sequences.completion_mask)
    paid = kl_coef if args.kl_placement == "reward" else 0.0
    rewards = token_rewards(token_scores, kl, mask, paid)
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, total(rewards), shift_mean=False)
    advantages, returns = compute_gae(rewards, rollout.values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask, total(advantages))
    experience = Experience(
        rollout.sequences, rollout.logprobs, rollout.ref_logprobs, rollout.values, advantages, returns, mask
    )
    return experience, paid * kl
