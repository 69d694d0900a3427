"""How several rewards compare in scale: what each decides of the scores, and weights that undo their deviations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.rewards import Reward, RewardOutputs, combine
from pipeline.runtime.devices import float64_device, in_float64
from pipeline.runtime.schedules import value_at
from pipeline.trainers.ppo.scores import RunningMoments, masked_moments

SHARE = "reward_share/"  # before the name of a reward in the log
LEAST_SHARE = 0.01  # of the variance; below it a reward hardly changes which completion is better


def scale_rewards(rewards: Sequence[Reward], deviations: Mapping[str, float]) -> list[Reward]:
    """Divide the weight of each reward by its deviation; rewards without one stay as they are."""
    return [replace(reward, weight=reward.weight / deviations.get(reward.name, 1.0)) for reward in rewards]


def weights_at(rewards: Sequence[Reward], episodes: int) -> list[Reward]:
    """Give each reward the weight that it has in training after so many episodes."""
    scheduled = [reward.weight if reward.weight_schedule is None else reward.weight_schedule for reward in rewards]
    return [
        replace(reward, weight=value_at(weight, episodes)) for reward, weight in zip(rewards, scheduled, strict=True)
    ]


def reward_deviations(
    rewards: Sequence[Reward], by_name: Mapping[str, Tensor], accelerator: Accelerator
) -> dict[str, float]:
    """Compute the standard deviation of each reward with `score_scaling: reference`, over all processes.

    `by_name` has the values [B] of each reward, NaN where it does not apply. A reward without a spread gets 1.
    """
    names = [reward.name for reward in rewards if reward.score_scaling == "reference"]
    if not names:
        return {}
    sums = torch.stack([masked_moments(by_name[name], by_name[name].isfinite()) for name in names])
    rows = accelerator.reduce(sums.to(float64_device(accelerator.device)), reduction="sum")
    moments = [RunningMoments.from_sums(row) if float(row[0]) else RunningMoments() for row in rows]
    return {name: seen.deviation for name, seen in zip(names, moments, strict=True)}


def fit_scales(
    rewards: Sequence[Reward], outputs: RewardOutputs, accelerator: Accelerator
) -> tuple[dict[str, float], RewardOutputs]:
    """Compute `reward_deviations` of the first rollout, and weigh its rewards by them; what had no score has none."""
    deviations = reward_deviations(rewards, outputs.by_name, accelerator)
    weighted_sum = combine(scale_rewards(rewards, deviations), outputs.by_name, range(len(outputs.weighted_sum)))
    missing = outputs.weighted_sum.isnan()
    return deviations, replace(outputs, weighted_sum=weighted_sum.masked_fill(missing, torch.nan))


def variance_shares(
    rewards: Sequence[Reward], by_name: Mapping[str, Tensor], scored: Tensor, accelerator: Accelerator
) -> dict[str, float]:
    """Compute which share of the variance of the weighted sum each of several rewards has, over all processes.

    The share of a reward is the covariance of its weighted values with the sum, divided by the variance of the sum:
    shares add up to 1, and are negative where a reward falls when the sum rises. `by_name` has the values [B] of each
    reward, which count where `scored [B]`. One reward has no share, nor has any where all sums are equal.
    """
    if len(rewards) < 2:
        return {}
    values = torch.stack([reward.weight * in_float64(by_name[reward.name].nan_to_num(0.0)) for reward in rewards])
    chosen = values[:, scored.cpu()]  # [R, scored]
    total = chosen.sum(0)
    sums = torch.cat([torch.ones_like(total).sum().view(1), chosen.sum(1), (chosen * total).sum(1)])
    sums = accelerator.reduce(sums.to(float64_device(accelerator.device)), reduction="sum").cpu()
    if not sums[0]:
        return {}
    means, products = (sums[1:] / sums[0]).chunk(2)
    covariances = products - means * means.sum()
    variance = float(covariances.sum())
    if variance <= 1e-12 * max(1.0, float(products.sum().abs())):
        return {}
    return {f"{SHARE}{reward.name}": float(c) / variance for reward, c in zip(rewards, covariances, strict=True)}


def share_sentences(figures: Mapping[str, float]) -> list[str]:
    """Say what each reward decides, for the log of the first rollout: what `variance_shares` returned is in `figures`.

    A reward below `LEAST_SHARE` gets a sentence of its own.
    """
    shares = {name.removeprefix(SHARE): share for name, share in figures.items() if name.startswith(SHARE)}
    if not shares:
        return []
    shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return [f"share of each reward in the variance of the scores of the first rollout: {shown}"] + [
        f"reward {name!r} decides {abs(share):.2%} of the variance of the scores, so PPO learns next to nothing from "
        "it: raise its weight, or give it score_scaling: reference in ppo.rewards, if its values differ at all"
        for name, share in shares.items()
        if abs(share) < LEAST_SHARE
    ]
