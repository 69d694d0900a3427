"""Fair baselines of PPO: SFT's checkpoint chosen by PPO's rule, and SFT for as long as SFT and PPO took together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig

from pipeline.evaluation.config import SFT_BY_METRIC, SFT_LONGER
from pipeline.evaluation.curves import read_events
from pipeline.models.generation import Completions, Decoding, finished, generate, seed_samples
from pipeline.models.loading import load_config, load_policy, load_tokenizer
from pipeline.models.prompts import encode_prompts_of
from pipeline.models.text import decode
from pipeline.recipe import Recipe
from pipeline.rewards import Reward, RewardOutputs
from pipeline.rewards.rows import compute_row_rewards
from pipeline.runtime.distributed import on_main
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.messages import say
from pipeline.runtime.seeds import keep_random_state
from pipeline.stages.directory import FINISHED, RunDirectory, read_record
from pipeline.stages.eval_inputs import report_rewards
from pipeline.stages.inputs import held_out_metrics
from pipeline.stages.task import base_model_path
from pipeline.tasks import Task
from pipeline.trainers.checkpoints import list_checkpoints, require_intact
from pipeline.trainers.huggingface.gather_weights import restore_settings
from pipeline.trainers.ppo.checkpoint import STATE_FILE, TrainerState
from pipeline.trainers.ppo.held_out import HeldOutData, evaluate_held_out
from pipeline.trainers.ppo.reward_scales import scale_rewards
from pipeline.trainers.precision import mixed_precision


def sft_keys(recipe: Recipe, run: RunDirectory, stage: str) -> dict[str, Any]:
    """Return the keys of SFTConfig by which a stage trains: those of the `sft:` section, changed for a baseline.

    Raises:
        ValueError: the logs of sft and ppo do not say how long they took.
    """
    keys = dict(recipe.sft.arguments)
    if stage == SFT_BY_METRIC:
        return {**keys, "save_total_limit": None, "load_best_model_at_end": False}
    return stretched(keys, time_factor(run)) if stage == SFT_LONGER else keys


def time_factor(run: RunDirectory) -> float:
    """Compute how many times as long as the training of SFT both SFT and PPO took.

    What SFT takes before its first step is not stretched, so it is not counted.

    Raises:
        ValueError: the logs do not say how long the stages took.
    """
    training, whole = training_seconds(run.sft), read_record(run.ppo / FINISHED).get("seconds")
    if not training or not whole:
        raise ValueError(
            f"{run.sft / 'timing.jsonl'} and {run.ppo / FINISHED} do not say how many seconds the stages took"
        )
    return 1 + whole / training


def training_seconds(directory: Path) -> float:
    """Sum up the clocks of a stage's timing.jsonl: each process that continued it has begun a new one."""
    seconds = [float(event["seconds"]) for event in read_events(directory / "timing.jsonl")]
    ends = [now for now, later in pairwise([*seconds, 0.0]) if later < now]
    return sum(ends)


def stretched(keys: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Make a training `factor` times as long, its warm-up included, so that its schedule keeps its form."""
    if keys.get("max_steps", SFTConfig.max_steps) > 0:
        longer = {"max_steps": round(keys["max_steps"] * factor)}
    else:
        longer = {"num_train_epochs": keys.get("num_train_epochs", SFTConfig.num_train_epochs) * factor}
    warmup = keys.get("warmup_steps", 0)
    if warmup >= 1:  # below 1 it is a share of the steps
        longer["warmup_steps"] = round(warmup * factor)
    return {**keys, **longer}


def choose_checkpoint(recipe: Recipe, run: RunDirectory, task: Task, directory: Path) -> dict[str, object]:
    """Save in `directory` the one of its checkpoints that PPO's rule chooses, as a plain model; return its figures.

    As in PPO, every checkpoint answers the held-out prompts, and `ppo.metric_for_best_model` of the answers decides;
    the first of equals is kept.

    Raises:
        ValueError: a damaged checkpoint, a metric that is not evaluated, or one that is finite for no checkpoint.
    """
    base, rewards = base_model_path(recipe, run), scaled_as_in_ppo(report_rewards(recipe, run, task), run)
    state, values = TrainerState(), {}
    name, greater = recipe.ppo.metric_for_best_model, recipe.ppo.greater_is_better
    for checkpoint in list_checkpoints(directory / "checkpoints"):
        require_intact(checkpoint)
        figures = evaluate_as_ppo(recipe, task, rewards, checkpoint, base)
        step = int(checkpoint.name.rpartition("-")[2])
        state = replace(state, step=step).compared(figures, name, greater)
        values[step] = figures[name] if math.isfinite(figures[name]) else None
        say(f"{checkpoint.name}: {name} {figures[name]:.4f}")
    if state.best_metric is None:
        raise ValueError(f"{name} is not a finite number for any checkpoint in {directory / 'checkpoints'}")

    def save() -> None:
        model = load_policy(directory / "checkpoints" / f"checkpoint-{state.best_step}", base, recipe.model)
        restore_settings(model.config, load_config(base, recipe.model))
        model.save_pretrained(directory)

    on_main(save)
    return {"best_step": state.best_step, f"{name}_by_step": values}


def scaled_as_in_ppo(rewards: Sequence[Reward], run: RunDirectory) -> list[Reward]:
    """Divide the weights of rewards with `score_scaling: reference` by the deviations of PPO's first rollout."""
    if all(reward.score_scaling == "none" for reward in rewards):
        return list(rewards)
    newest = list_checkpoints(run.ppo / "checkpoints")[-1]
    return scale_rewards(rewards, read_record(newest / STATE_FILE).get("reward_deviations", {}))


def evaluate_as_ppo(
    recipe: Recipe, task: Task, rewards: Sequence[Reward], checkpoint: Path, base: Path | str
) -> dict[str, float]:
    """Compute what PPO's evaluation would log of a policy that is this checkpoint."""
    args, tokenizer = recipe.ppo, load_tokenizer(base, recipe.model)
    device = PartialState().device
    # Not PPO's accelerator: that of SFT's trainer is there, and may have another precision.
    is_bf16 = mixed_precision("ppo", args.bf16) == "bf16"
    model = load_policy(checkpoint, base, recipe.model).to(device).eval()
    examples = task.validation
    if args.eval_examples:
        examples = examples.select(range(min(args.eval_examples, len(examples))))
    data = HeldOutData(examples, encode_prompts_of(tokenizer, examples, model.config.is_encoder_decoder))
    size = args.local_rollout_forward_batch_size
    batches = BatchSize(size)

    def write(
        prompt_ids: Sequence[Sequence[int]], decoding: Decoding, seed: int | None = None, rank: int = 0
    ) -> Completions:
        def attempt(rows: int) -> list[list[int]]:
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)
            with keep_random_state(seed is not None), autocast:
                if seed is not None:
                    seed_samples(model, decoding, seed, rank, len(prompt_ids))
                return generate(model, tokenizer, prompt_ids, decoding, rows)

        ids = batches.run(attempt)
        ended = torch.tensor(finished(model, tokenizer, ids, decoding))
        return Completions(ids, decode(tokenizer, ids, task.strip_thoughts), ended)

    def compute_rewards(rows: Dataset, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> RewardOutputs:
        return compute_row_rewards(rewards, rows, texts, ids, args.reward_handling)

    metrics, copies = held_out_metrics(recipe, task), args.num_generations_eval
    if copies == 1:
        return evaluate_held_out(data, size, write, args.greedy, compute_rewards, metrics)
    samples = data.repeated(copies)
    return evaluate_held_out(samples, size, write, args.sampling, compute_rewards, metrics, recipe.seed)
