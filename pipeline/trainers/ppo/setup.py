"""What a PPO run is built from: the accelerator, the shared model with its learned rewards, the log."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel

from pipeline.models.completion_lengths import reference_length
from pipeline.models.sharding import shards_models
from pipeline.models.shared import SharedModel
from pipeline.rewards import Reward
from pipeline.rewards.learned import AdapterReward
from pipeline.runtime.devices import APPLE_GPU_IDLE, has_apple_gpu
from pipeline.runtime.distributed import without_engine
from pipeline.runtime.messages import say
from pipeline.runtime.schedules import schedule_values, value_at
from pipeline.trainers.logs import TrainingLog
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.config_checks import check_steps
from pipeline.trainers.ppo.inputs import Policy
from pipeline.trainers.ppo.reward_scales import weights_at
from pipeline.trainers.precision import mixed_precision
from pipeline.trainers.trackers import installed


def settle(args: PPOConfig, start: Policy, dataset: Dataset) -> PPOConfig:
    """Return the settings with what the inputs decide: a `response_length` from the references where none is set.

    Without an adapter all weights are trained, whatever `use_peft` says, by the defaults of that.

    Raises:
        ValueError: as `reference_length`, or settings that need an adapter.
    """
    if start.peft_config is None and args.use_peft:
        args = replace(args, use_peft=False)
    if args.response_length is not None:
        return args
    length = reference_length(start.tokenizer, start.model.config, dataset, "ppo.response_length")
    return replace(args, response_length=length)


def make_accelerator(args: PPOConfig, directory: Path) -> Accelerator:
    """Make the accelerator of a run, with its precision and the trackers that are installed.

    Raises:
        ValueError: a precision that this machine does not have, or as `check_steps`.
    """
    with without_engine():  # PPO shards its model itself, and accelerate sees processes with models of their own
        accelerator = Accelerator(
            cpu=has_apple_gpu(),
            mixed_precision=mixed_precision("ppo", args.bf16),
            log_with=installed(args.report_to, ppo=True) or None,
            project_dir=str(directory),
            # No buffer of a language model is trained; sent with a pass, one process could not repeat that pass alone.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    check_steps(args, accelerator.num_processes)
    if has_apple_gpu():
        say(APPLE_GPU_IDLE)
    return accelerator


def build_shared_model(
    model: PreTrainedModel, args: PPOConfig, peft_config: LoraConfig | None, rewards: Sequence[Reward]
) -> SharedModel:
    """Put every role of PPO on `model`, the adapters of learned rewards included.

    Raises:
        ValueError: the value function is to start as a learned reward, and there is none on this model, or several.
    """
    learned = [reward for reward in weights_at(rewards, 0) if isinstance(reward.function, AdapterReward)]
    if args.value_model == "reward_model" and len(learned) != 1:
        raise ValueError(
            f"ppo.value_model: reward_model needs one learned reward whose adapter is over the policy's base, found "
            f"{len(learned)}; use adapter"
        )
    if not shards_models() and model.device != PartialState().device:
        model.to(PartialState().device)  # now: on a CPU the probe passes over a large model take minutes
    shared = SharedModel(
        model,
        peft_config if args.use_peft else None,
        value_at(args.temperature, 0),
        value_adapter=args.value_model != "head",
        entropy_gradient=max(schedule_values(args.entropy_coef)) > 0,
        padding_free=args.padding_free,
        suppress_tokens=args.suppress_tokens,
    )
    for reward in learned:
        shared.add_reward(reward.function.directory)
        # By name when it is called: sharding puts another method in its stead.
        reward.function.attach(lambda sequences: shared.reward_scores(sequences), shared.language_model)
    if args.value_model == "reward_model":
        record, scale = learned[0].function.record, learned[0].weight / learned[0].function.record.scale
        shared.start_value_as_reward(learned[0].function.directory, scale, -scale * record.shift)
    if args.gradient_checkpointing:
        shared.enable_gradient_checkpointing()
    return shared.train()


def open_log(accelerator: Accelerator, directory: Path, num_steps: int, step: int, args: PPOConfig) -> TrainingLog:
    """Open the log of a run of `num_steps` that goes on after `step`."""
    return TrainingLog(
        accelerator,
        directory,
        num_steps,
        step,
        args.logging_steps,
        args.num_sample_generations,
        project=(args.run_name or "relay-ppo") if args.report_to else None,
    )
