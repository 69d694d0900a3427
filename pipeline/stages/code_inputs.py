"""The user's code that a stage runs: the task, rewards and metrics of the recipe, and what they import."""

import os
from pathlib import Path

from pipeline.evaluation.config import SFT_LONGER
from pipeline.recipe import Recipe
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.user_code import is_user_code, user_code_files
from pipeline.stages.directory import last_section

LIBRARY = "evaluate:"
MEAN_REWARD = "eval_reward"


def code_files(recipe: Recipe, stage: str) -> dict[str, Path]:
    """Return the files of a user's code that decide the result of a stage, by name."""
    names = [recipe.task.name, *(step.name for step in recipe.augment)]
    rewards = [] if recipe.ppo is None else [reward.name for reward in recipe.ppo.rewards]
    if stage == "reward" and recipe.reward is not None and isinstance(recipe.reward.pairs, SampledPairs):
        names.append(recipe.reward.pairs.metric)
    draws = stage in ("sft", SFT_LONGER) and recipe.sft.best_of_n is not None  # samples, and chooses by rewards
    if draws or last_section(stage) in ("ppo", "eval"):
        names += rewards
    numbers = range(len(recipe.eval.metrics)) if stage == "eval" else choosing_metrics(recipe, stage)
    names += [recipe.eval.metrics[number].name for number in numbers]
    code_names = [_script(name) if name.startswith(LIBRARY) else name for name in names if is_user_code(name)]
    return user_code_files(name for name in code_names if name is not None)


def choosing_metrics(recipe: Recipe, stage: str) -> list[int]:
    """Return which of `eval.metrics` decide the result of a stage: those that may choose PPO's best checkpoint."""
    if last_section(stage) != "ppo" or recipe.ppo.metric_for_best_model == MEAN_REWARD:
        return []
    names = [f"eval_{metric.name}" for metric in recipe.eval.metrics]
    every = list(range(len(names)))  # where it is named by the user's code, it may be any
    return [number for number in every if names[number] == recipe.ppo.metric_for_best_model] or every


def _script(name: str) -> str | None:
    """Return the script of a metric of the `evaluate` library; None for one of the Hub."""
    path = Path(os.path.expanduser(name.removeprefix(LIBRARY)))
    file = path / f"{path.name}.py" if path.is_dir() else path
    return str(file) if file.is_file() else None
