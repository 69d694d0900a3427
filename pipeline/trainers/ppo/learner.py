"""PPO's update: optimizer, schedule, and passes over an experience in mini-batches and micro-batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from pipeline.models.sequences import Sequences
from pipeline.models.shared import SharedModel
from pipeline.runtime.memory import in_smaller_batches, is_out_of_memory
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.objective import Clipping, LossTerms, ppo_loss
from pipeline.trainers.ppo.rollout import Experience, TokenOutputs, compute_token_outputs

TERMS = tuple(field.name for field in fields(LossTerms))
EARLY_STOP_FACTOR = 1.5  # as stable-baselines3 and TRL 0.11 read target_kl


@dataclass(frozen=True)
class Update:
    """What one update did: statistics to log, how many optimizer steps it made, and which it skipped.

    A step whose gradient is not finite is skipped, with a sentence in `notes`; `skipped_in_row` are the last ones.
    """

    stats: dict[str, float]
    steps: int
    skipped: int
    skipped_in_row: int
    notes: tuple[str, ...]


class LastPassError(Exception):
    """Memory ran out where one of several processes cannot begin anew alone."""


class Learner:
    """The trained parameters of a shared model with their optimizer and learning-rate schedule."""

    def __init__(self, shared: SharedModel, args: PPOConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.micro_batch_size = args.per_device_train_batch_size  # less once memory has run out
        policy, value = shared.policy_parameters(), shared.value_parameters()
        optimizer = torch.optim.AdamW(
            [{"params": policy}, {"params": value, "lr": args.value_learning_rate or args.learning_rate}],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        shared.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(shared, optimizer)
        self.shared: SharedModel = accelerator.unwrap_model(self.model)
        self.scheduler = self._schedule(args.num_optimizer_steps(accelerator.num_processes))
        self.clipping = Clipping(
            args.cliprange, args.cliprange_high or args.cliprange, args.cliprange_value, args.dual_clip
        )

    def _schedule(self, steps: int) -> LRScheduler:
        # Not prepared: accelerate would step it once per process, and the schedule would end early.
        return get_scheduler(
            self.args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.args.warmup_steps,
            num_training_steps=steps,
        )

    def restore(self, optimizer: dict, scheduler: dict, steps: int | None = None) -> None:
        """Go on from saved states; `steps`: the optimizer steps of the whole run, where these changed."""
        if steps is not None:
            self.scheduler = self._schedule(steps)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)

    def forward(self, sequences: Sequences) -> tuple[Sequences, TokenOutputs]:
        """Compute log-probs, values and entropies of a rollout, in the micro-batches it will be learnt from.

        The sequences come back with the states of an encoder that nothing trains: they stay the same.
        """

        def attempt(size: int) -> tuple[Sequences, TokenOutputs]:
            with self.accelerator.autocast():
                encoded = self.shared.encoded(sequences, size)
                return encoded, compute_token_outputs(self.shared, encoded, size)

        outputs, self.micro_batch_size = in_smaller_batches(attempt, self.micro_batch_size)
        return outputs

    def update(
        self, experience: Experience, seed: int, kl_coef: float, value_only: bool = False, skipped_in_row: int = 0
    ) -> Update:
        """`num_ppo_epochs` passes of `num_mini_batches` optimizer steps; `seed` draws the mini-batches.

        With `value_only` the policy's gradients are dropped. The schedule moves by the planned number of steps even
        where `target_kl` ends the passes early, so that it ends with the run. `skipped_in_row` steps before this
        update were skipped; a mini-batch without a score makes no step and counts as none.

        Raises:
            FloatingPointError: the gradients of `max_skipped_steps` in a row were not finite.
        """
        args, generator = self.args, torch.Generator().manual_seed(seed)
        totals, tokens, norms, notes = torch.zeros(len(TERMS)), 0, [], []
        first_ratio, stopped = float("nan"), False
        for epoch in range(args.num_ppo_epochs):
            for number, mini_batch in enumerate(experience.mini_batches(args.num_mini_batches, generator)):
                count = 0 if stopped else self._global_tokens(mini_batch)
                if count:
                    sums = self._accumulate(mini_batch, count, kl_coef)
                    means = dict(zip(TERMS, (sums / count).tolist(), strict=True))
                    first_ratio = means["ratio"] if not tokens else first_ratio
                    totals, tokens = totals + sums, tokens + count
                    stopped = args.target_kl is not None and means["approx_kl"] > EARLY_STOP_FACTOR * args.target_kl
                    if not stopped:
                        norm = self._clip(value_only)
                        norms.append(norm)
                        if math.isfinite(norm):
                            self.optimizer.step()
                        skipped_in_row = 0 if math.isfinite(norm) else skipped_in_row + 1
                    if not stopped and skipped_in_row:
                        notes.append(_skipped(epoch, number, means, norm, skipped_in_row))
                    if skipped_in_row >= args.max_skipped_steps:
                        raise FloatingPointError(
                            f"{notes[-1]}, which is ppo.max_skipped_steps: nothing was learnt from them and nothing "
                            "is saved; lower ppo.learning_rate, set ppo.bf16: false, or look at the rewards"
                        )
                    self.optimizer.zero_grad()
                self.scheduler.step()
        stats = self._statistics(totals / max(1, tokens), first_ratio, norms)
        return Update(stats, len(norms) - len(notes), len(notes), skipped_in_row, tuple(notes))

    def _statistics(self, means: Tensor, first_ratio: float, norms: Sequence[float]) -> dict[str, float]:
        mean = dict(zip(TERMS, means.tolist(), strict=True))
        return {
            "loss/policy_avg": mean["policy"],
            "loss/value_avg": mean["value"],
            "policy/approxkl_avg": mean["approx_kl"],
            "policy/clipfrac_avg": mean["policy_clipped"],
            "val/clipfrac_avg": mean["value_clipped"],
            "val/ratio": mean["ratio"],
            "val/ratio_first": first_ratio,
            "policy/entropy_avg": mean["entropy"],
            "policy/grad_norm": sum(norms) / max(1, len(norms)),
            "policy/optimizer_steps": float(sum(map(math.isfinite, norms))),
            "policy/memory_parts": float(-(-self.args.per_device_train_batch_size // self.micro_batch_size)),
            "lr": self.scheduler.get_last_lr()[0],
        }

    def _global_tokens(self, mini_batch: Experience) -> int:
        return int(self.accelerator.reduce(torch.tensor(mini_batch.num_tokens, device=self.accelerator.device)))

    def _clip(self, value_only: bool) -> float:
        """Clip the gradient; its norm before, over what is trained."""
        if value_only:
            for parameter in self.shared.policy_parameters():
                parameter.grad = None
        return float(self.accelerator.clip_grad_norm_(self.shared.parameters(), self.args.max_grad_norm))

    def _accumulate(self, mini_batch: Experience, count: int, kl_coef: float) -> Tensor:
        """Gradients of a mini-batch with `count` tokens over all processes; returns the global sums of `TERMS`.

        Where memory runs out it begins anew with half as many episodes at a time: the gradient is the same. Processes
        meet in the last pass, so what happens there cannot be repeated by one of several alone.

        Raises:
            RuntimeError: out of memory with single episodes.
            LastPassError: out of memory in the last pass of one of several processes.
        """

        def attempt(size: int) -> Tensor:
            self.optimizer.zero_grad()
            return self._gradients(mini_batch, count, kl_coef, size)

        sums, self.micro_batch_size = in_smaller_batches(attempt, self.micro_batch_size)
        return self.accelerator.reduce(sums, reduction="sum").cpu()

    def _gradients(self, mini_batch: Experience, count: int, kl_coef: float, size: int) -> Tensor:
        args, sums = self.args, torch.zeros(len(TERMS), device=self.accelerator.device)
        loss_kl_coef = kl_coef if args.kl_placement == "loss" else 0.0
        parts = mini_batch.micro_batches(size)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._synchronised(last), self.accelerator.autocast():
                outputs = self.model(part.sequences)
                terms = ppo_loss(
                    outputs.logprobs,
                    outputs.values,
                    outputs.entropies,
                    part.logprobs,
                    part.ref_logprobs,
                    part.values,
                    part.advantages,
                    part.returns,
                    part.mask,
                    self.clipping,
                )
                loss = terms.policy + args.vf_coef * terms.value
                if args.entropy_coef:
                    loss = loss - args.entropy_coef * terms.entropy
                if loss_kl_coef:
                    loss = loss + loss_kl_coef * terms.reference_kl
                # DDP averages over processes, so their number turns its mean back into the sum.
                self.accelerator.backward(loss * self.accelerator.num_processes / count)
            sums += torch.stack([getattr(terms, name).detach().float() for name in TERMS])
        return sums

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Exchange gradients between processes with the last micro-batch only."""
        if not last:
            with self.accelerator.no_sync(self.model):
                yield
            return
        try:
            yield
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or not is_out_of_memory(error):
                raise
            raise LastPassError(f"{error} (in the pass in which the processes exchange gradients)") from error


def _skipped(epoch: int, mini_batch: int, means: Mapping[str, float], norm: float, in_row: int) -> str:
    """Which optimizer step was not made, and why."""
    what = "gradient" if math.isfinite(means["policy"]) and math.isfinite(means["value"]) else "loss"
    return (
        f"PPO epoch {epoch + 1}, mini-batch {mini_batch + 1}: the {what} is not finite (policy loss "
        f"{means['policy']:.3g}, value loss {means['value']:.3g}, gradient norm {norm:.3g}): no optimizer step, "
        f"{in_row} in a row"
    )
