"""The statistics of a rollout that are logged, over all processes."""

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pipeline.rewards import RewardError
from pipeline.runtime.devices import float64_device, in_float64
from pipeline.trainers.ppo.rollout import Rollout


def rollout_statistics(
    rollout: Rollout, returns: Tensor, kl_penalties: Tensor, num_generations: int, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Means over the scored episodes of all processes, under TRL's names; KL and entropy are nats per episode.

    `kl_penalties [B, C]` is what each token's reward loses for its KL; `objective/kl` itself is the k1 estimate, which
    is unbiased where samples are those of the whole policy: not with top-k, top-p or a minimum length.
    `num_generations` neighbouring rows answer one prompt. `step` is for the message.

    Raises:
        RewardError: not one episode has a score, and a reward failed.
    """
    sums = _sums_over_processes(_rollout_sums(rollout, returns, kl_penalties, num_generations), accelerator)
    episodes, tokens = sums["episodes"], sums["tokens"]
    if not episodes and sums["failures"]:
        raise RewardError(f"PPO step {step}: no completion has a score, see what failed above")
    episodes, tokens = episodes or math.nan, tokens or math.nan  # where no reward applies there is nothing to average
    stats = {name: value / episodes for name, value in sums.items() if name.startswith("objective/")}
    mean = stats["objective/scores"]
    stats["objective/scores_std"] = max(0.0, sums["squared scores"] / episodes - mean**2) ** 0.5
    stats["objective/reward_errors"] = sums["failures"]
    # With one completion of each prompt, the batch over all processes is compared: all of them are equal, or none.
    equal = stats["objective/scores_std"] <= 1e-6 * max(1.0, abs(mean))
    stats["objective/frac_reward_zero_std"] = (
        sums["prompts with equal scores"] / sums["prompts"]
        if num_generations > 1 and sums["prompts"]
        else float(equal)
    )
    variance = sums["squared returns"] / tokens - (sums["returns"] / tokens) ** 2
    residual = sums["squared errors"] / tokens - (sums["errors"] / tokens) ** 2
    stats["objective/advantage_std"] = max(0.0, residual) ** 0.5  # an advantage is the return less the value
    stats["val/explained_variance"] = 1 - residual / variance if variance > 1e-12 else 0.0
    for name in rollout.rewards:
        count = sums[f"completions with reward/{name}"]
        stats[f"reward/{name}"] = sums[f"reward/{name}"] / count if count else float("nan")
    return stats | named_metrics(rollout.log.metrics)


def sample_rows(rollout: Rollout) -> list[dict[str, object]]:
    """Return the table of a rollout's episodes: texts, score, each reward, and the columns that rewards logged."""
    columns = dict(rollout.log.extras) | {"score": rollout.scores.tolist()}
    columns |= {f"reward/{name}": values.tolist() for name, values in rollout.rewards.items()}
    texts = zip(rollout.prompts, rollout.completions, strict=True)
    return [
        {**{name: values[row] for name, values in columns.items()}, "prompt": prompt, "completion": completion}
        for row, (prompt, completion) in enumerate(texts)
    ]


def named_metrics(metrics: Mapping[str, Sequence[float]], prefix: str = "") -> dict[str, float]:
    """Average what reward functions logged, over their calls and all processes; every process calls it."""
    gathered = gather_object([dict(metrics)])
    averages = {}
    for name in sorted({name for each in gathered for name in each}):
        numbers = [number for each in gathered for number in each.get(name, ())]
        averages[f"{prefix}{name}"] = math.fsum(numbers) / len(numbers)
    return averages


def _rollout_sums(rollout: Rollout, returns: Tensor, kl_penalties: Tensor, num_generations: int) -> dict[str, Tensor]:
    """What `rollout_statistics` needs, as sums over this process's scored episodes, by name."""
    mask, scored, scores = rollout.mask, rollout.scored, rollout.scores
    non_score_reward = -(kl_penalties * mask).sum(1)
    equal, prompts = prompts_with_equal_scores(scores, scored, num_generations)
    errors, chosen_returns = in_float64((returns - rollout.values)[mask]), in_float64(returns[mask])
    per_episode = {
        "objective/scores": scores,
        "objective/kl": ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(1),
        "objective/entropy": (rollout.entropies * mask).sum(1),
        "objective/non_score_reward": non_score_reward,
        "objective/rlhf_reward": scores + non_score_reward,
        "objective/length": mask.sum(1),
        "objective/finished": rollout.finished.to(scored.device).float() * scored,
        "squared scores": in_float64(scores).square(),
    }
    sums = {name: in_float64(values).sum() for name, values in per_episode.items()} | {
        "episodes": scored.sum(),
        "failures": torch.tensor(len(rollout.failures)),
        "prompts": prompts,
        "prompts with equal scores": equal,
        "tokens": mask.sum(),
        "errors": errors.sum(),
        "squared errors": errors.square().sum(),
        "returns": chosen_returns.sum(),
        "squared returns": chosen_returns.square().sum(),
    }
    for name, values in rollout.rewards.items():
        sums[f"reward/{name}"] = in_float64(values.nan_to_num(0.0)).sum()
        sums[f"completions with reward/{name}"] = (~values.isnan()).sum()
    return sums


def _sums_over_processes(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    stacked = torch.stack([in_float64(value).cpu() for value in sums.values()])
    stacked = stacked.to(float64_device(accelerator.device))
    return dict(zip(sums, accelerator.reduce(stacked, reduction="sum").tolist(), strict=True))


def prompts_with_equal_scores(scores: Tensor, scored: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Count the prompts whose completions all have equal scores, and all prompts, of `size` neighbouring rows each.

    Such a prompt teaches nothing (Razin et al. 2024, arXiv:2310.20703). `scores [B]` count where `scored [B]`.
    """
    groups, counted = scores.view(-1, size), scored.view(-1, size)
    highest = groups.masked_fill(~counted, -torch.inf).amax(1)
    lowest = groups.masked_fill(~counted, torch.inf).amin(1)
    any_scored = counted.any(1)
    return (any_scored & (highest - lowest <= 1e-8)).sum(), any_scored.sum()
