"""What the stage scripts make of a recipe: paths of models, the learned reward, metrics."""

from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.metrics import load_metric
from pipeline.recipe import Recipe
from pipeline.rewards.classifier import ClassifierReward
from pipeline.rewards.learned import (
    CALIBRATION_ROWS,
    AdapterReward,
    is_reward_folder,
    load_learned_reward,
    reward_on_references,
)
from pipeline.runtime.messages import say
from pipeline.stages.directory import RunDirectory
from pipeline.tasks import Task


def sft_model_path(recipe: Recipe, run: RunDirectory) -> Path | str:
    """Return the SFT model that PPO starts from and is compared with."""
    return run.find_model(recipe.ppo.sft_model_path, recipe) if recipe.sft_is_external else run.sft


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


def held_out_metrics(recipe: Recipe, task: Task) -> Callable[[list[str], Dataset], dict[str, float]]:
    """Return a function that computes `eval.metrics` of held-out completions and the rows they answer, as numbers."""
    metrics = [load_metric(metric.name, task.language, **metric.options) for metric in recipe.eval.metrics]

    def compute(completions: list[str], rows: Dataset) -> dict[str, float]:
        references = list(rows["references"])
        return {m.name: m.corpus_score(completions, references, n_bootstrap=1).value for m in metrics}

    return compute
