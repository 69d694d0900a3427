"""Exact resume for trainers of transformers and TRL: an interrupted run ends with the same bits."""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from pipeline.runtime.seeds import of_this_process, random_state, restore_random_state
from pipeline.runtime.signals import Stopped, requested_stop
from pipeline.runtime.watchdog import enter, watched
from pipeline.trainers.checkpoints import (
    check_space,
    clear_checkpoints,
    keep_newest,
    load_tensors,
    new_checkpoint,
    newest_checkpoint,
    require_finite,
    require_intact,
    tensors_alone,
)
from pipeline.trainers.huggingface.samplers import GlobalLengthGroupedSampler

LOOP_FILE = "loop_state.pt"


class ResumableTrainer(Trainer):
    """A base class to list before a trainer of TRL: atomic, complete checkpoints, and no step on a gradient of NaN.

    transformers 5.23 writes a checkpoint in place. It leaves out the sums since the last log line, TRL's metrics, and
    the random state from which an epoch drew the order of its examples. Here a checkpoint holds all of these, and
    `train(resume_from_checkpoint=...)` restores them. `section` is the recipe's section that messages name.
    """

    section = "sft"

    def __init__(self, *, args: TrainingArguments, **kwargs) -> None:
        args._n_gpu = min(
            args.n_gpu, 1
        )  # a process that sees several would train on all, with as many times the batch
        super().__init__(args=args, **kwargs)
        self._loop: dict | None = None  # what this process restores from the checkpoint
        self._loss_is_finite, self._epoch_is_ending, self._save_is_due = True, False, False
        self._handled_step = -1
        self.add_callback(_LoopCallback(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train from the start, or from a checkpoint to the end.

        Raises:
            Stopped: a signal ended the training, after a checkpoint.
            FloatingPointError: the loss, the gradient or a weight is not finite.
            OSError: the checkpoints do not fit on the disk.
            ValueError: the checkpoint is damaged, or was made by another number of processes.
        """
        checkpoints = Path(self.args.output_dir)
        if resume_from_checkpoint is None:
            clear_checkpoints(checkpoints)
        else:
            require_intact(Path(resume_from_checkpoint))
            processes = load_tensors(Path(resume_from_checkpoint) / LOOP_FILE)["processes"]
            self._loop = of_this_process(processes, resume_from_checkpoint)
        # The checkpoints that are kept, the one being written, and the best one.
        count = (self.args.save_total_limit or 1) + 1 + bool(self.args.load_best_model_at_end)
        check_space(checkpoints, self._checkpoint_size(), 1 if self.args.save_strategy == "no" else count)
        with watched(checkpoints):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _checkpoint_size(self) -> int:
        """Estimate the bytes of a checkpoint from below: weights, and two moments of each for Adam."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        saved = self._saved_parameters()
        optimizer = str(self.args.optim.value)
        moments = 2 if "adam" in optimizer and "bit" not in optimizer else 0
        size = sum(p.numel() * p.element_size() for p in saved)
        return size + moments * sum(p.numel() * p.element_size() for p in trained)

    def _saved_parameters(self) -> list[nn.Parameter]:
        """Return the weights that a checkpoint holds: those of the adapter if there is one, else all."""
        adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        return [p for p in self.model.parameters() if p.requires_grad or not adapter]

    def restore_loop(self) -> None:
        """Restore what the training loop keeps outside `TrainerState`, after the loop has set it to zero."""
        self._handled_step = self.state.global_step
        if self._loop is None:
            return
        self.args.eval_on_start = False  # the interrupted run has done so
        self._tr_loss = self._loop["tr_loss"].to(self.args.device)
        self._total_loss_scalar = self._loop["total_loss"]
        self._globalstep_last_logged = self._loop["logged_step"]
        self._initial_global_step = 0  # train_loss is the mean over the whole run
        self._total_train_tokens = self._loop["tokens"]
        for mode, values in self._loop["metrics"].items():
            self._metrics[mode] = defaultdict(list, values)
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            require_intact(best)
            self.state.best_model_checkpoint = str(best)

    def _loop_state(self) -> dict[str, object]:
        return {
            "random": random_state(),
            "random_of_epoch": self._random_of_epoch,
            "tr_loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": {mode: dict(values) for mode, values in self._metrics.items()},
        }

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        return GlobalLengthGroupedSampler(sampler) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _run_epoch(self, **kwargs) -> None:
        self._steps_per_epoch = kwargs["num_update_steps_per_epoch"]
        if self.state.global_step >= self.state.max_steps:  # resumed from the checkpoint of the last step
            self.control.should_training_stop = True
            return
        if self._loop is not None:
            inside = self.state.global_step % self._steps_per_epoch
            restore_random_state(self._loop["random_of_epoch" if inside else "random"])
        self._random_of_epoch = random_state()
        super()._run_epoch(**kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with tensors_alone(f"{checkpoint}/optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state in the first epoch after a restart, once the examples already seen are skipped."""
        if self._loop is not None:
            restore_random_state(self._loop["random"])
            self._loop = None

    def training_step(self, *args, **kwargs):
        """Compute one micro-batch, and remember whether its loss is finite."""
        enter(f"step {self.state.global_step + 1} of {self.section}")
        loss = super().training_step(*args, **kwargs)
        self._loss_is_finite &= bool(torch.isfinite(loss))
        return loss

    def prediction_step(self, *args, **kwargs):
        """Evaluate one batch, and tell the watchdog so."""
        enter(f"the evaluation after step {self.state.global_step} of {self.section}")
        return super().prediction_step(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the gradient's norm before each optimizer step; refuse a loss or norm that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 infinite gradients are normal, and the scaler skips those steps itself.
        scaled = self.accelerator.scaler is not None
        gradient_is_finite = scaled or bool(torch.isfinite(torch.as_tensor(norm)))
        if not (self._loss_is_finite and gradient_is_finite):
            what = "gradient" if self._loss_is_finite else "loss"
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the {what} is not finite, so no step is made and nothing saved; "
                f"lower {self.section}.learning_rate, or look at the examples of that step"
            )
        return norm

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        """Log, evaluate and save after each step and when an epoch ends; a save at its last step waits for that.

        A restart from that checkpoint begins the next epoch, so it must hold what the end of this epoch logs.
        """
        step = self.state.global_step
        last = step % self._steps_per_epoch == 0 or step >= self.state.max_steps
        self._epoch_is_ending = last and step != self._handled_step
        self._handled_step = step
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self._epoch_is_ending:
            return
        number = requested_stop()
        if self._save_is_due or (number and not self._checkpoint(step).is_dir()):
            self._save_checkpoint(model, trial)
        if number:
            raise Stopped(number, step)

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint completely or not at all, then remove the oldest."""
        self._save_is_due = self._epoch_is_ending
        if self._save_is_due:
            return
        step = self.state.global_step
        enter(f"the checkpoint after step {step} of {self.section}")
        self.store_flos()
        require_finite({n: p for n, p in self.model.named_parameters() if p.requires_grad}, step)
        loops = gather_object([self._loop_state()])
        best = self.state.best_global_step or None
        if best == step:
            self.state.best_model_checkpoint = str(self._checkpoint(step))
        with new_checkpoint(Path(self.args.output_dir), step, self._checkpoint_size()) as folder:
            self.save_model(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            if self.args.should_save:
                # A pickle: loading it would run code, and nothing here needs it.
                (folder / "training_args.bin").unlink(missing_ok=True)
                torch.save({"processes": loops}, folder / LOOP_FILE)
                self.state.save_to_json(str(folder / "trainer_state.json"))
        keep_newest(Path(self.args.output_dir), self.args.save_total_limit, best)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load the weights of a checkpoint under the names that they have in the model."""
        if not self._load_whole(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint under the names that they have in the model."""
        if not self._load_whole(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _load_whole(self, checkpoint: str, model: nn.Module) -> bool:
        """Load all weights of a model of transformers, if it is whole on this process; return whether it was done.

        Files have the names of the Hub, which differ from those of many modules: transformers' trainer would leave
        such weights as they are.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
            return False
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return True

    def _finalize_training(self, *args, **kwargs):
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            require_intact(Path(self.state.best_model_checkpoint))
        # The losses since the last log line are those of this process; train_loss is the mean over all processes.
        self._tr_loss = self.accelerator.gather(self._tr_loss).mean()
        # With a limit of 1 transformers would delete the last checkpoint here, before the result is saved.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        result = super()._finalize_training(*args, **kwargs)
        self.args.save_total_limit = limit
        return result


class _LoopCallback(TrainerCallback):
    """Restores the loop's state where the training loop has just set it to zero."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.restore_loop()


def last_checkpoint(args: TrainingArguments) -> str | None:
    """Find the newest intact checkpoint of an interrupted run; damaged ones are named on stderr.

    Raises:
        ValueError: files are missing from a checkpoint, or all checkpoints are damaged.
    """
    checkpoint, notes = newest_checkpoint(Path(args.output_dir))
    if PartialState().is_main_process:
        for note in [*notes, *([f"continuing from {checkpoint}"] if checkpoint else [])]:
            print(note, file=sys.stderr)
    return str(checkpoint) if checkpoint else None
