"""What the stage scripts make of a recipe: the task's examples, paths of models, the learned reward, metrics."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.metrics import load_metric
from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.text import encode_prompts_of, plain_text
from pipeline.recipe import Recipe
from pipeline.rewards.classifier import ClassifierReward
from pipeline.rewards.learned import (
    CALIBRATION_ROWS,
    AdapterReward,
    is_reward_folder,
    load_learned_reward,
    reward_on_references,
)
from pipeline.runtime.messages import one_line, say
from pipeline.stages.directory import RunDirectory
from pipeline.tasks import Task, load_task


def load_recipe_task(recipe: Recipe) -> Task:
    """Load the recipe's task and print which rows are left out.

    Raises:
        TaskError: as `load_task`.
    """
    task = load_task(recipe.task.name, recipe.task.config)
    say_left_out("task", task.left_out)
    return task


def say_left_out(section: str, left_out: Sequence[str]) -> None:
    """Print how many rows give no example, and the first three of them."""
    if left_out:
        rows = "1 row is" if len(left_out) == 1 else f"{len(left_out):,} rows are"
        more = f"; and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        say(one_line(f"{section}: {rows} left out: {'; '.join(left_out[:3])}{more}"))


def left_out_record(task: Task) -> dict[str, object]:
    """Return what stage.json holds of rows that were left out: their number and the first three, if there are any."""
    if not task.left_out:
        return {}
    return {"rows_left_out": len(task.left_out), "first_left_out": list(task.left_out[:3])}


def base_model_path(recipe: Recipe, run: RunDirectory, task: Task) -> Path | str:
    """Return the model SFT starts from; a from-scratch one is built by the first call."""
    if recipe.model.from_scratch is None:
        return recipe.model.model_name_or_path
    texts = [text for column in ("prompt", "completion") for text in map(plain_text, task.train[column])]
    return build_from_scratch(recipe.model.from_scratch, texts, recipe.seed, run.base)


def sft_model_path(recipe: Recipe, run: RunDirectory) -> Path | str:
    """Return the SFT model that PPO starts from and is compared with."""
    return recipe.ppo.sft_model_path if recipe.sft_is_external else run.sft


def reward_model_path(recipe: Recipe, run: RunDirectory) -> Path | str:
    """Return the learned reward of PPO: the folder of a reward stage, or a classifier."""
    return recipe.ppo.reward_model_path if recipe.reward_is_external else run.reward


def learned_reward(
    recipe: Recipe, run: RunDirectory, task: Task, tokenizer: PreTrainedTokenizerBase
) -> AdapterReward | ClassifierReward | None:
    """Load the function of the reward `learned`, if the recipe has one; an adapter still has to be attached.

    Raises:
        ValueError: no finished reward model, one that PPO must not trust, or no classifier with one output.
    """
    config = recipe.ppo.learned_reward if recipe.ppo else None
    if config is None:
        return None
    path = reward_model_path(recipe, run)
    reward = load_learned_reward(path, recipe.model, tokenizer, recipe.min_accuracy, config.options)
    if isinstance(reward, ClassifierReward):
        reward.to(PartialState().device)
        if not is_reward_folder(path):
            say(f"{path}: a classifier that no reward stage has evaluated, so its accuracy is unknown")
            first = task.prompts[:CALIBRATION_ROWS]
            reward_on_references(reward, first["prompt"], [references[0] for references in first["references"]])
    return reward


def check_prompts(recipe: Recipe, task: Task, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts that leave PPO or the evaluation no room for a completion.

    Raises:
        ValueError: as `check_prompt_lengths`.
    """
    splits = [("eval.max_new_tokens", recipe.eval.max_new_tokens, "test", task.test)]
    if recipe.ppo is not None:
        length = recipe.ppo.response_length
        held_out = task.validation.select(range(min(len(task.validation), recipe.ppo.eval_examples or sys.maxsize)))
        splits += [("ppo.response_length", length, "train", task.prompts)]
        splits += [("ppo.response_length", length, "validation", held_out)]
    for key, length, split, rows in splits:
        prompts = encode_prompts_of(tokenizer, rows, config.is_encoder_decoder)
        check_prompt_lengths(prompts, length, config, key, split)


def held_out_metrics(recipe: Recipe, task: Task) -> Callable[[list[str], Dataset], dict[str, float]]:
    """Return a function that computes `eval.metrics` of held-out completions and the rows they answer, as numbers."""
    metrics = [load_metric(metric.name, task.language, **metric.options) for metric in recipe.eval.metrics]

    def compute(completions: list[str], rows: Dataset) -> dict[str, float]:
        references = list(rows["references"])
        return {m.name: m.corpus_score(completions, references, n_bootstrap=1).value for m in metrics}

    return compute
