"""PPO's loss on tensors: nothing here knows a model, a text or a setting.

Shapes: `B` episodes, `C` completion tokens. `mask [B, C]` is True on real tokens. Sums run over real tokens only.
Source: Schulman et al. 2017 (PPO, arXiv:1707.06347), equation 7.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.models.shared import PolicyOutputs
from pipeline.trainers.ppo.rollout import Experience

# exp(20) is 5e8: beyond that a ratio says only that something broke, and would overflow in the loss.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Clipping:
    """How far an update may move: ratios within [1 - low, 1 + high], values within +- `value` of the old ones.

    `dual` bounds what a token with a negative advantage can cost, whose ratio is otherwise unbounded above (Ye et al.
    2020, arXiv:1912.09729). `high` above `low` leaves unlikely tokens room to grow (Yu et al. 2025, arXiv:2503.14476).
    `level` says of what a ratio is, see `importance_ratio`.
    """

    low: float = 0.2
    high: float = 0.2
    value: float = 0.2
    dual: float | None = None
    level: str = "token"


@dataclass(frozen=True)
class LossTerms:
    """Sums over the tokens of a micro-batch, to be divided by the tokens of the whole mini-batch.

    `policy` and `reference_kl` are weighted as the experience says, and to be divided by its counts instead.
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

    def rescaled(self, factor: float) -> "LossTerms":
        """Return terms with a policy loss and a KL to the reference that are `factor` times as large."""
        return replace(self, policy=self.policy * factor, reference_kl=self.reference_kl * factor)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token [B, C], in nats (Schulman, "Approximating KL", 2020).

    `k1` is unbiased, with either sign; `k3` is unbiased, too, never negative and has less variance; `k2`, half the
    squared log ratio, is biased, but its gradient on samples of the policy is that of the KL.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(log_ratio) - log_ratio


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, estimator: str) -> Tensor:
    """Return each token's term of the loss [B, C] whose gradient, on average, is that of KL(policy || reference).

    Alone, `k3` has the gradient of the other direction, KL(reference || policy). Times the `ratio` of new and old
    policy, with its gradient, it is exact, also after the first optimizer step (TRL's `use_bias_correction_kl`). `k2`
    goes without the ratio, as in OpenRLHF, and is exact where the ratio is 1.
    """
    kl = kl_penalty(logprobs, ref_logprobs, estimator)
    return kl * ratio if estimator == "k3" else kl


def importance_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """Turn the log ratios of new and old policy, [B, C] and 0 where masked, into ratios: 1 before the first step.

    `token`: [B, C]. The others are one for each completion, [B, 1]: `sequence` of the mean of its log ratios (Zheng et
    al. 2025, GSPO, arXiv:2507.18071), `completion` of their sum, which is the ratio of its probabilities.
    """
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True)
    if level == "sequence":
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_loss(
    outputs: PolicyOutputs, experience: Experience, clipping: Clipping, kl_estimator: str = "k3"
) -> LossTerms:
    """Compute the clipped surrogate, the clipped value loss, entropy and KL to the reference, as sums.

    Args:
        outputs: `logprobs, entropies, values [B, C]` of the policy as it is now, with gradients.
        experience: The same episodes as they were collected, all [B, C].
        clipping: How far the policy and the values may move.
        kl_estimator: The estimator of `reference_kl`, see `kl_loss`.
    """
    mask, advantages, returns = experience.mask, experience.advantages, experience.returns
    log_ratio = ((outputs.logprobs - experience.logprobs) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = importance_ratio(log_ratio, mask, clipping.level)
    unclipped = -advantages * ratio
    policy = torch.maximum(unclipped, -advantages * ratio.clamp(1.0 - clipping.low, 1.0 + clipping.high))
    if clipping.dual is not None:
        policy = torch.where(advantages < 0, torch.minimum(policy, -advantages * clipping.dual), policy)
    near = torch.maximum(outputs.values, experience.values - clipping.value)
    near = torch.minimum(near, experience.values + clipping.value)
    value_unclipped, value_clipped = (outputs.values - returns).square(), (near - returns).square()
    reference_kl = kl_loss(outputs.logprobs * mask, experience.ref_logprobs * mask, ratio, kl_estimator)
    weights = mask.to(outputs.logprobs.dtype)
    return LossTerms(
        policy=(policy * experience.weights).sum(),
        value=0.5 * (torch.maximum(value_unclipped, value_clipped) * weights).sum(),
        entropy=(outputs.entropies * weights).sum(),
        reference_kl=(reference_kl * experience.weights).sum(),
        approx_kl=(0.5 * log_ratio.detach().square() * weights).sum(),
        policy_clipped=((policy != unclipped) * weights).sum(),
        value_clipped=((value_clipped > value_unclipped) * weights).sum(),
        ratio=(ratio.detach() * weights).sum(),
    )
