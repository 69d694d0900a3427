"""What the optimizer steps of one PPO update did: sums of their losses, norms, and which were skipped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.trainers.ppo.objective import LossTerms

# Those of the loss, and the SFT loss of references that are mixed in
TERMS = (*(field.name for field in fields(LossTerms)), "reference_loss")


@dataclass(frozen=True)
class OptimizerStep:
    """What one mini-batch did: the sums of `TERMS` over its `tokens` on all processes, and the gradient's `norm`.

    `norm` is None where no step was tried: nothing in the mini-batch has a score, or the policy `is_too_far`.
    """

    sums: Tensor
    tokens: int
    norm: float | None
    is_too_far: bool = False

    @property
    def is_skipped(self) -> bool:
        """Whether the gradient was not finite, so that the optimizer made no step."""
        return self.norm is not None and not math.isfinite(self.norm)

    def mean(self, term: str) -> float:
        """The mean of one of `TERMS` over the tokens."""
        return float(self.sums[TERMS.index(term)]) / max(1, self.tokens)


@dataclass(frozen=True)
class Update:
    """What one update did: statistics to log, and which optimizer steps it skipped for want of a finite gradient.

    `skipped_in_row` are the last ones; `notes` has a sentence for each.
    """

    stats: dict[str, float]
    skipped_in_row: int
    notes: Sequence[str]


class UpdateLog:
    """The optimizer steps of one update as they are made."""

    def __init__(self, num_mini_batches: int, max_skipped_steps: int, skipped_in_row: int) -> None:
        self.num_mini_batches, self.max_skipped_steps = num_mini_batches, max_skipped_steps
        self.skipped_in_row = skipped_in_row
        self.steps: list[OptimizerStep] = []
        self.notes: list[str] = []

    @property
    def is_over(self) -> bool:
        """Whether the policy has moved so far that nothing more is learnt from this experience."""
        return bool(self.steps) and self.steps[-1].is_too_far

    def add(self, step: OptimizerStep) -> None:
        """Count a step; one that was skipped leaves a note.

        Raises:
            FloatingPointError: `max_skipped_steps` in a row were skipped.
        """
        epoch, number = divmod(len(self.steps), self.num_mini_batches)
        self.steps.append(step)
        if step.norm is None:
            return
        if not step.is_skipped:
            self.skipped_in_row = 0
            return
        self.skipped_in_row += 1
        policy, value = step.mean("policy"), step.mean("value")
        what = "gradient" if math.isfinite(policy) and math.isfinite(value) else "loss"
        self.notes.append(
            f"PPO epoch {epoch + 1}, mini-batch {number + 1}: the {what} is not finite (policy loss {policy:.3g}, "
            f"value loss {value:.3g}, gradient norm {step.norm:.3g}): no optimizer step, "
            f"{self.skipped_in_row} in a row"
        )
        if self.skipped_in_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"{self.notes[-1]}, which is ppo.max_skipped_steps: nothing was learnt from them and nothing is "
                "saved; lower ppo.learning_rate, set ppo.bf16: false, or look at the rewards"
            )

    def statistics(self) -> dict[str, float]:
        """Average over the tokens of all steps, under TRL's names."""
        tokens = sum(step.tokens for step in self.steps)
        mean = OptimizerStep(torch.stack([step.sums for step in self.steps]).sum(0), tokens, None).mean
        norms = [step.norm for step in self.steps if step.norm is not None]
        ratios = [step.mean("ratio") for step in self.steps if step.tokens]
        mixed_in = {"loss/ptx_avg": mean("reference_loss")} if mean("reference_loss") else {}
        return mixed_in | {
            "loss/policy_avg": mean("policy"),
            "loss/value_avg": mean("value"),
            "policy/approxkl_avg": mean("approx_kl"),
            "policy/clipfrac_avg": mean("policy_clipped"),
            "val/clipfrac_avg": mean("value_clipped"),
            "val/ratio": mean("ratio"),
            "val/ratio_first": next(iter(ratios), math.nan),
            "policy/entropy_avg": mean("entropy"),
            "policy/grad_norm": sum(norms) / max(1, len(norms)),
            "policy/optimizer_steps": float(sum(map(math.isfinite, norms))),
        }
