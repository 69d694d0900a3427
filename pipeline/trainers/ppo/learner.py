"""PPO's update: optimizer, schedule, and passes over an experience in mini-batches and micro-batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.sharding import Sharding
from pipeline.models.shared import PASSES, PolicyOutputs, SharedModel
from pipeline.models.slices import whole
from pipeline.runtime.memory import in_smaller_batches
from pipeline.runtime.messages import say
from pipeline.runtime.schedules import value_at
from pipeline.trainers.ppo.checks import check_trained_dtypes
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.exchange import GradientExchange
from pipeline.trainers.ppo.moving_reference import REFERENCE, MovingReference
from pipeline.trainers.ppo.objective import Clipping, LossTerms, ppo_loss
from pipeline.trainers.ppo.reference_texts import deal_out
from pipeline.trainers.ppo.rollout import Experience, TokenOutputs, Warn, compute_token_outputs
from pipeline.trainers.ppo.update_log import TERMS, OptimizerStep, Update, UpdateLog
from pipeline.trainers.shards import OPTIMIZER, read_optimizer, read_slices

EARLY_STOP_FACTOR = 1.5  # as stable-baselines3 and TRL 0.11 read target_kl
Result = TypeVar("Result")


def first_micro_batch_size(args: PPOConfig, device: torch.device, num_processes: int) -> int:
    """Return the episodes of the first micro-batch: on one accelerator those of a whole mini-batch.

    On a CPU the rounding of recorded runs stays. Of several processes none can begin anew in the pass in which they
    meet, and that would be the only one.
    """
    size = args.per_device_train_batch_size
    if device.type == "cpu" or num_processes > 1:
        return size
    return size * args.gradient_accumulation_steps // args.num_mini_batches


class Learner:
    """The trained parameters of a shared model with their optimizer and learning-rate schedule."""

    def __init__(self, shared: SharedModel, args: PPOConfig, accelerator: Accelerator, warn: Warn) -> None:
        self.args, self.accelerator, self.warn = args, accelerator, warn
        self._first_size = first_micro_batch_size(args, accelerator.device, accelerator.num_processes)
        self.micro_batch_size = self._first_size  # less once memory has run out
        if self._first_size > args.per_device_train_batch_size:
            say(f"PPO: micro-batches of {self._first_size} episodes, half as many wherever memory runs out")
        check_trained_dtypes(shared)
        self.sharding = Sharding()
        self.sharding.place(shared, PASSES, rare=shared.frozen_copy)
        optimizer = torch.optim.AdamW(
            [
                {"params": shared.policy_parameters()},
                {"params": shared.value_parameters(), "lr": args.value_function_learning_rate},
            ],
            lr=args.policy_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        if self.sharding.roots:  # what accelerate would do for a model has been done
            self.model, self.optimizer = shared, accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(shared, optimizer)
        self.shared: SharedModel = accelerator.unwrap_model(self.model)
        self.exchange = GradientExchange(accelerator, self.model, is_sharded=bool(self.sharding.roots))
        self.scheduler = self._schedule(args.num_optimizer_steps(accelerator.num_processes))
        self.entropy_coef = value_at(args.entropy_coef, 0)
        self._scored: tuple[Sequences, PolicyOutputs] | None = None  # the policy's pass over a rollout, with its graph
        self.moving_reference = MovingReference(self.shared.policy_parameters()) if args.sync_ref_model else None
        self.clipping = Clipping(
            args.cliprange,
            args.cliprange_high or args.cliprange,
            args.cliprange_value,
            args.dual_clip,
            args.importance_sampling_level,
        )

    def follow_schedules(self, episodes: int) -> None:
        """Set what changes during a run to its value after so many episodes."""
        self.shared.temperature = value_at(self.args.temperature, episodes)
        self.entropy_coef = value_at(self.args.entropy_coef, episodes)

    def _schedule(self, steps: int) -> LRScheduler:
        # Not prepared: accelerate would step it once per process, and the schedule would end early.
        return get_scheduler(
            self.args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.args.warmup_steps,
            num_training_steps=steps,
        )

    @property
    def reduced_micro_batch_size(self) -> int | None:
        """The size of micro-batches where memory has run out; None: still the first."""
        return self.micro_batch_size if self.micro_batch_size < self._first_size else None

    def restore(
        self, folder: Path, groups: Sequence[dict], scheduler: dict, micro_batch_size: int | None, steps: int | None
    ) -> None:
        """Go on from what was saved in a folder; `steps`: the optimizer steps of the whole run, where these changed.

        Raises:
            ValueError: as `read_slices`.
        """
        if steps is not None:
            self.scheduler = self._schedule(steps)
        read_slices(self.trained_weights(), folder, others=(OPTIMIZER, REFERENCE))
        read_optimizer(self.optimizer, groups, folder)
        self.scheduler.load_state_dict(scheduler)
        self.micro_batch_size = min(micro_batch_size or self._first_size, self._first_size)

    def trained_weights(self) -> dict[str, Tensor]:
        """Return everything that training changes, by name, as this process holds it."""
        reference = {} if self.moving_reference is None else self.moving_reference.named_weights()
        return self.shared.trained_weights() | reference

    def after_step(self, step: int) -> None:
        """Move the reference towards the policy where `sync_ref_model` asks for it after this PPO step."""
        if self.moving_reference is not None and step % self.args.ref_model_sync_steps == 0:
            self.moving_reference.mix(self.args.ref_model_mixup_alpha)

    def forward(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int
    ) -> tuple[Sequences, TokenOutputs]:
        """Compute log-probs, values and entropies of a rollout, in the micro-batches it will be learnt from.

        The sequences come with the states of an encoder that nothing trains: they stay the same. Where one micro-batch
        is the whole of the first optimizer step, that step takes the gradient of this pass and makes none of its own.
        """
        sequences = make_sequences(prompt_ids, completion_ids, pad_id, self.accelerator.device)
        keep_graph = not self.exchange.is_needed and not self.args.ptx_coef  # whose passes come before, and need room
        self.drop_graph()

        def attempt(size: int) -> tuple[Sequences, TokenOutputs, PolicyOutputs | None]:
            with self.accelerator.autocast():
                encoded = self.shared.encoded(sequences, size) if self.shared.encoder_is_frozen else sequences
                return encoded, *compute_token_outputs(self.shared, encoded, size, self.moving_reference, keep_graph)

        sequences, outputs, scored = self._in_micro_batches(attempt)
        self._scored = None if scored is None else (sequences, scored)
        return sequences, outputs

    def update(
        self,
        experience: Experience,
        seed: int,
        value_only: bool = False,
        skipped_in_row: int = 0,
        references: Sequences | None = None,
    ) -> Update:
        """Make `num_ppo_epochs` passes of `num_mini_batches` optimizer steps; `seed` draws the mini-batches.

        Each pass goes over the `references` as well, `ptx_coef` times whose SFT loss is added to the loss.
        With `value_only` the policy's gradients are dropped. The schedule moves by the planned number of steps even
        where `target_kl` ends the passes early, so that it ends with the run. `skipped_in_row` steps before this
        update were skipped; a mini-batch without a score makes no step and counts as none.

        Raises:
            FloatingPointError: the gradients of `max_skipped_steps` in a row were not finite.
        """
        args, generator = self.args, torch.Generator().manual_seed(seed)
        log = UpdateLog(args.num_mini_batches, args.max_skipped_steps, skipped_in_row)
        for _ in range(args.num_ppo_epochs):
            mini_batches = experience.mini_batches(args.num_mini_batches, generator)
            dealt = deal_out(references, len(mini_batches), generator)
            for mini_batch, its_references in zip(mini_batches, dealt, strict=True):
                if not log.is_over:
                    log.add(self.optimizer_step(mini_batch, value_only, its_references))
                self.scheduler.step()
        self.drop_graph()
        stats = log.statistics() | {
            "policy/memory_parts": float(-(-self._first_size // self.micro_batch_size)),
            "lr": self.scheduler.get_last_lr()[0],
        }
        return Update(stats, log.skipped_in_row, log.notes)

    def optimizer_step(
        self, mini_batch: Experience, value_only: bool = False, references: Sequences | None = None
    ) -> OptimizerStep:
        """Learn from one mini-batch: forward and backward in micro-batches, clip the gradient, step."""
        sizes = torch.tensor([mini_batch.num_tokens, int(mini_batch.counts.sum())], device=self.accelerator.device)
        tokens, count = self.accelerator.reduce(sizes, reduction="sum").tolist()
        if not tokens:
            return OptimizerStep(torch.zeros(len(TERMS)), 0, None)
        step = OptimizerStep(self._accumulate_gradients(mini_batch, tokens, count, references), tokens, None)
        target_kl = self.args.target_kl
        if target_kl is not None and step.mean("approx_kl") > EARLY_STOP_FACTOR * target_kl:
            step = OptimizerStep(step.sums, tokens, None, is_too_far=True)
        else:
            step = OptimizerStep(step.sums, tokens, self._clip_gradients(value_only))
            if not step.is_skipped:
                self.optimizer.step()
        self.optimizer.zero_grad()
        return step

    def _accumulate_gradients(
        self, mini_batch: Experience, tokens: int, count: int, references: Sequences | None
    ) -> Tensor:
        """Compute the gradients of a mini-batch with `tokens` on all processes; return the global sums of `TERMS`.

        The policy loss is divided by `count`: tokens, or completions, of all processes.

        Where memory runs out it begins anew with half as many episodes at a time: the gradient is the same. Processes
        meet in the last pass, so what happens there cannot be repeated by one of several alone.

        Raises:
            RuntimeError: out of memory with single episodes.
            LastPassError: out of memory in the last pass of one of several processes.
        """

        reference_tokens = 0
        if references is not None:
            reference_tokens = int(self.accelerator.reduce(references.completion_mask.sum(), reduction="sum"))

        def attempt(size: int) -> Tensor:
            self.optimizer.zero_grad()
            sums = torch.zeros(len(TERMS), device=self.accelerator.device)
            if references is not None:
                sums[-1] = self._accumulate_reference_gradients(references, reference_tokens, size) * tokens
            micro_batches = mini_batch.micro_batches(size)
            for number, micro_batch in enumerate(micro_batches):
                with self.exchange.in_pass(is_last=number == len(micro_batches) - 1), self.accelerator.autocast():
                    outputs = self._take_scored(mini_batch, micro_batch) or self.model(micro_batch.sequences)
                    terms = ppo_loss(outputs, micro_batch, self.clipping, self.args.kl_estimator)
                    terms = terms.rescaled(tokens / count)
                    # DDP averages over processes, so their number turns its mean back into the sum.
                    loss = self._loss(terms, mini_batch.kl_coef) * self.accelerator.num_processes / tokens
                    self.accelerator.backward(loss)
                sums[:-1] += torch.stack(
                    [term.detach().float() for term in vars(terms).values()]
                )  # in the order of TERMS
            return sums

        return self.accelerator.reduce(self._in_micro_batches(attempt), reduction="sum").cpu()

    def drop_graph(self) -> None:
        """Free the graph of the pass that scored a rollout, where what comes next needs its memory."""
        self._scored = None

    def _take_scored(self, mini_batch: Experience, micro_batch: Experience) -> PolicyOutputs | None:
        """Return the pass that scored these rows, once; None where they were not scored in one pass."""
        (sequences, outputs), self._scored = self._scored or (None, None), None
        is_whole = sequences is mini_batch.sequences and len(micro_batch.sequences) == len(mini_batch.sequences)
        return outputs if is_whole else None

    def _accumulate_reference_gradients(self, references: Sequences, tokens: int, size: int) -> Tensor:
        """Add the gradients of `ptx_coef` times the SFT loss: the mean over the reference tokens of all processes.

        `tokens` is their number.

        Returns:
            This process's share of that mean.
        """
        total = torch.zeros((), device=self.accelerator.device)
        temperature, self.shared.temperature = self.shared.temperature, 1.0  # SFT knows none
        try:
            for _, rows in references.batches(size):
                with self.exchange.left_out(), self.accelerator.autocast():
                    loss = -self.model(rows).logprobs.sum() / tokens
                    self.accelerator.backward(self.args.ptx_coef * loss * self.accelerator.num_processes)
                total += loss.detach()
        finally:
            self.shared.temperature = temperature
        return total

    def _loss(self, terms: LossTerms, kl_coef: float) -> Tensor:
        loss = terms.policy + self.args.value_loss_weight * terms.value
        if self.entropy_coef:
            loss = loss - self.entropy_coef * terms.entropy
        if kl_coef:
            loss = loss + kl_coef * terms.reference_kl
        return loss

    def _clip_gradients(self, value_only: bool) -> float:
        """Clip the gradient; return its norm before, over what is trained."""
        if value_only:
            for parameter in self.shared.policy_parameters():
                parameter.grad = None
        return float(whole(self.accelerator.clip_grad_norm_(self.shared.parameters(), self.args.max_grad_norm)))

    def _in_micro_batches(self, call: Callable[[int], Result]) -> Result:
        before = self.micro_batch_size
        together = self.sharding.together
        result, self.micro_batch_size = in_smaller_batches(lambda size: together(lambda: call(size)), before)
        if self.micro_batch_size < before:
            self.warn(
                f"out of memory: from now on micro-batches of {self.micro_batch_size} instead of {before} episodes, "
                "as many as before to a step"
            )
        return result
