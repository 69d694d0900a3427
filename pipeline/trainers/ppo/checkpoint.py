"""What a PPO checkpoint holds, and how it is written and read: safetensors and JSON, so nothing in one is executed."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import transformers
from accelerate import PartialState
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from pipeline.models.processors import save_processor
from pipeline.models.shared import SharedModel
from pipeline.models.shared_files import gather_shared_weights, save_shared
from pipeline.runtime.seeds import derive_seed, random_state, restore_random_state
from pipeline.trainers.checkpoints import (
    check_space,
    clear_checkpoints,
    keep_newest,
    new_checkpoint,
    newest_checkpoint,
    require_finite,
    require_intact,
)
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.experiment import Experiment, check_experiment, record_experiment, with_settings
from pipeline.trainers.ppo.learner import Learner
from pipeline.trainers.ppo.moving_reference import REFERENCE
from pipeline.trainers.ppo.scores import RunningMoments
from pipeline.trainers.shards import OPTIMIZER, optimizer_tensors, read_slices, write_slices

STATE_FILE, OPTIMIZER_FILE, RANDOM_FILE = "trainer_state.json", "optimizer.json", "random_state.json"


@dataclass(frozen=True)
class TrainerState:
    """How far a run is. Prompts, sampling and mini-batches follow from the seed and `step`."""

    step: int = 0
    episodes: int = 0  # of all processes; another number of them makes other steps
    best_step: int = 0
    best_metric: float | None = None
    skipped_steps: int = 0
    skipped_in_row: int = 0  # of them, those that end with the last optimizer step
    micro_batch_size: int | None = None  # where memory has run out; None: still the first
    kl_coef: float | None = None  # where it adapts; None: still the setting
    score_count: float = 0.0  # moments of the scores that were scaled by them
    score_mean: float = 0.0
    score_squares: float = 0.0
    reward_deviations: Mapping[str, float] = field(default_factory=dict)  # by name, of the rewards that are scaled

    @property
    def score_moments(self) -> RunningMoments:
        """The moments of the scores so far."""
        return RunningMoments(self.score_count, self.score_mean, self.score_squares)

    def total_steps(self, args: PPOConfig, num_processes: int) -> int:
        """Steps of the whole run, those already made included, which another number of processes may have made."""
        left = (args.total_episodes - self.episodes) / args.batch_size(num_processes)
        return args.max_steps or self.step + math.ceil(left)

    def for_rewards(self, args: PPOConfig, num_steps: int, num_prompts: int) -> transformers.TrainerState:
        """Return the state as reward functions get it: what TRL counts in optimizer steps is in PPO steps."""
        state = PartialState()
        return transformers.TrainerState(
            epoch=self.episodes / args.num_generations / num_prompts,
            global_step=self.step,
            max_steps=num_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps or max(1, num_steps // 10),
            save_steps=args.save_steps or args.eval_steps or max(1, num_steps // 10),
            train_batch_size=args.per_device_train_batch_size,
            best_metric=self.best_metric,
            best_global_step=self.best_step,
            is_local_process_zero=state.is_local_main_process,
            is_world_process_zero=state.is_main_process,
        )

    def advanced(self, episodes: int, moments: RunningMoments, kl_coef: float | None) -> "TrainerState":
        """Return the state after one more step of `episodes`."""
        return replace(
            self,
            step=self.step + 1,
            episodes=self.episodes + episodes,
            kl_coef=kl_coef,
            score_count=moments.count,
            score_mean=moments.mean,
            score_squares=moments.squares,
        )

    def compared(self, values: Mapping[str, float], name: str, greater_is_better: bool) -> "TrainerState":
        """Return the state after an evaluation: this step is the best so far if its metric `name` is.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        if name not in values:
            raise ValueError(f"ppo.metric_for_best_model: {name!r} is not one of {', '.join(values)}")
        metric, sign, best = values[name], 1 if greater_is_better else -1, self.best_metric
        if math.isfinite(metric) and (best is None or sign * metric > sign * best):
            return replace(self, best_metric=metric, best_step=self.step)
        return self


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on beside its tensors: how far it is, and the settings of optimizer and scheduler.

    `groups` are the optimizer's groups of weights. `random` holds the generators' states of each process: a reward
    function may draw from them.
    """

    state: TrainerState
    groups: Sequence[dict[str, object]]
    scheduler: dict[str, object]
    random: Sequence[dict[str, object]]


def save_training(directory: Path, state: TrainerState, learner: Learner) -> None:
    """Write a checkpoint of all that a run needs to go on; every process calls it.

    Raises:
        FloatingPointError, OSError: as `save_checkpoint`.
    """
    args = learner.args
    checkpoint = Checkpoint(
        replace(state, micro_batch_size=learner.reduced_micro_batch_size),
        learner.optimizer.state_dict()["param_groups"],
        learner.scheduler.state_dict(),
        gather_object([random_state()]),
    )
    protect = state.best_step if args.load_best_model_at_end else None
    tensors = (learner.trained_weights(), optimizer_tensors(learner.optimizer))
    save_checkpoint(directory, checkpoint, *tensors, args.save_total_limit, protect)


def save_policy(directory: Path, shared: SharedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the policy, the value head and what makes the inputs; every process calls it, the main one writes."""
    weights = gather_shared_weights(shared) if isinstance(shared, FSDPModule) else None
    if PartialState().is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        save_shared(shared, directory, weights)
        save_processor(tokenizer, shared.language_model.config, directory)
    PartialState().wait_for_everyone()


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    keep: int,
    protect: int | None = None,
) -> Path:
    """Write `directory/checkpoint-<step>` and remove all but the newest `keep` and the one of step `protect`.

    Every process calls it and writes its slices of `weights` and `moments`; the main one writes the rest.

    Raises:
        FloatingPointError: a weight is not finite.
        OSError: the disk is full.
    """
    step = checkpoint.state.step
    require_finite(weights, step)
    with new_checkpoint(directory, step, state_size(weights)) as folder:
        write_slices({**weights, **moments}, folder)
        if PartialState().is_main_process:
            optimization = {"groups": checkpoint.groups, "scheduler": checkpoint.scheduler}
            (folder / OPTIMIZER_FILE).write_text(json.dumps(optimization))
            (folder / RANDOM_FILE).write_text(json.dumps(checkpoint.random))
            (folder / STATE_FILE).write_text(json.dumps(asdict(checkpoint.state), indent=2))
    keep_newest(directory, keep, protect)
    return directory / f"checkpoint-{step}"


def state_size(weights: Mapping[str, Tensor]) -> int:
    """About how many bytes a checkpoint takes: the trained weights and AdamW's two moments of each."""
    return 3 * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def load_checkpoint(path: Path) -> Checkpoint:
    """Check all of a checkpoint, and read what it holds beside its tensors.

    Raises:
        ValueError: a file is missing, or not what was saved; a field of the state is missing or unknown.
    """
    require_intact(path)
    optimization = _read_json(path / OPTIMIZER_FILE)
    random = _read_json(path / RANDOM_FILE)
    return Checkpoint(_load_state(path / STATE_FILE), optimization["groups"], optimization["scheduler"], random)


def restore_training(
    directory: Path, state: TrainerState, learner: Learner, seed: int, resume: bool | None, experiment: Experiment
) -> tuple[TrainerState, list[str]]:
    """Go on from the newest intact checkpoint if there is one.

    Where `resume` is False, remove them all instead. Where it is None, go on only with an unfinished run of the same
    settings and rewards; where it is True, the rewards have to be the same.

    Returns:
        The state to go on from, `state` where there is no checkpoint, and sentences for the log.

    Raises:
        ValueError: as `newest_checkpoint`, `load_checkpoint` and `check_experiment`, or the run is finished.
        OSError: the checkpoints of the run do not fit on the disk.
    """
    if resume is False:
        if state.step:
            raise ValueError(
                f"train(resume_from_checkpoint=False): this trainer is at step {state.step} and cannot start anew; "
                "make a new PPOTrainer"
            )
        clear_checkpoints(directory)
    path, notes = newest_checkpoint(directory)
    args = learner.args
    if path:
        check_experiment(directory, experiment, settings_too=resume is None)
        checkpoint = load_checkpoint(path)
        state = checkpoint.state
        if resume is None and state.step >= state.total_steps(args, learner.accelerator.num_processes):
            raise ValueError(
                f"{directory} holds this experiment at its end, step {state.step}, so nothing would be trained: "
                "train(resume_from_checkpoint=True) restores its policy; for another run give another output_dir, or "
                "train(resume_from_checkpoint=False), which removes them and starts anew"
            )
        notes.append(f"continuing from {path}{_restore(path, checkpoint, learner, seed)}")
    record_experiment(directory, experiment)
    count = args.save_total_limit + 1 + args.load_best_model_at_end  # the one being written, the best
    check_space(directory, state_size(learner.trained_weights()), count)
    return state, notes


def _restore(path: Path, checkpoint: Checkpoint, learner: Learner, seed: int) -> str:
    """Put a checkpoint back; return what is not as it would have been without the interruption."""
    args, accelerator, state = learner.args, learner.accelerator, checkpoint.state
    before, processes = len(checkpoint.random), accelerator.num_processes
    same = before == processes
    steps = state.total_steps(args, processes)
    learner.restore(
        path,
        *with_settings(checkpoint.groups, checkpoint.scheduler, args),
        state.micro_batch_size,
        None if same else steps * args.num_ppo_epochs * args.num_mini_batches,
    )
    if same:
        restore_random_state(checkpoint.random[accelerator.process_index])
        return ""
    set_seed(derive_seed(seed, "resumed run", state.step, accelerator.process_index) % 2**32)
    return (
        f", which {before} processes made; this run has {processes}, so from episode {state.episodes} on batches, "
        "samples and learning rates are others: the curve will not be identical to that of a run without the change"
    )


def restore_best(directory: Path, state: TrainerState, shared: SharedModel, metric: str) -> str:
    """Make the policy that of the best step, or of the start where no step was better; return a sentence on it."""
    best = f"best {metric} {state.best_metric:.4f} at step {state.best_step}"
    if state.best_step:
        path = directory / f"checkpoint-{state.best_step}"
        require_intact(path)
        read_slices(shared.trained_weights(), path, others=(OPTIMIZER, REFERENCE))
        return best
    shared.restart_policy()
    return f"{best}: no later one was better, so the policy is the model it started from"


def _read_json(file: Path):
    if not file.is_file():
        raise ValueError(
            f"{file} is missing, and the checkpoint was complete without it: another version made it; go on with that "
            "version, or remove the stage's directory"
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} cannot be read: {error}; remove the checkpoint to start from the one before"
        ) from error


def _load_state(file: Path) -> TrainerState:
    values, names = _read_json(file), {entry.name for entry in fields(TrainerState)}
    if values.keys() != names:
        missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
        raise ValueError(
            f"{file} was made by another version: missing {', '.join(missing) or 'nothing'}, unknown "
            f"{', '.join(unknown) or 'nothing'}; go on with that version, or remove the stage's directory"
        )
    return TrainerState(**values)
