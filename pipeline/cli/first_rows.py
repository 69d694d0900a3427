"""What the stages make of the first rows of a recipe's data: a prompt, its reference, their tokens, and rewards."""

import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.models.hub import check_model_path
from pipeline.models.loading import is_encoder_decoder, load_tokenizer
from pipeline.models.prompts import encode_rows
from pipeline.models.text import encode_completions, plain_text, render_chat
from pipeline.recipe import Recipe, load_recipe
from pipeline.rewards import build_rewards
from pipeline.rewards.rows import compute_row_rewards
from pipeline.stages.directory import RunDirectory
from pipeline.stages.task import base_model_path, load_recipe_task
from pipeline.tasks import Task, load_task

ROWS = 200
LIMITS = [f"task.max_train_examples={ROWS}", "task.max_validation_examples=2", "task.max_test_examples=2"]
SHOWN_TOKENS = 24


def describe_first_rows(file: Path) -> list[str]:
    """Read the first rows as the stages do, and return what a user should look at, by line.

    Raises:
        ValueError: the recipe, its data or a reward cannot be used, in a sentence.
    """
    recipe = load_recipe(file, LIMITS)
    problem = tokenizer_problem(recipe)
    if problem is not None:
        task = load_task(recipe.task.name, recipe.task.config)
        return [*describe_row(recipe, task, None), f"tokens: not shown, because {problem}"]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        recipe, task = load_recipe_task(recipe, run)
        tokenizer = load_tokenizer(base_model_path(recipe, run), recipe.model)
    return describe_row(recipe, task, tokenizer)


def tokenizer_problem(recipe: Recipe) -> str | None:
    """Return why the tokenizer of a recipe's model cannot be loaded now; None where it can, or is made of the data."""
    path = recipe.model.model_name_or_path
    if path is None:
        return None
    try:
        check_model_path(path, "model.model_name_or_path", recipe.model.model_revision)
        load_tokenizer(path, recipe.model)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def describe_row(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the lines about the first training row."""
    row = task.train[0]
    prompt, reference = row["prompt"], (row["references"] or [plain_text(row["completion"])])[0]
    lines = ["the first prompt:", *_indented(_rendered(prompt, tokenizer)), "its reference:", *_indented(reference)]
    ids: list[int] = []
    if tokenizer is not None:
        [prompt_ids] = encode_rows(tokenizer, task.train.select([0]), is_encoder_decoder(recipe.model))
        [ids] = encode_completions(tokenizer, [prompt], [reference])
        shown = [repr(tokenizer.decode([token])) for token in [*prompt_ids, *ids][:SHOWN_TOKENS]]
        more = ", ..." if len(prompt_ids) + len(ids) > SHOWN_TOKENS else ""
        whose = "" if recipe.model.from_scratch is None else " (by a tokenizer of these rows; a run makes one of all)"
        lines += [f"tokens: {len(prompt_ids)} of the prompt, {len(ids)} of the reference{whose}:"]
        lines += _indented(" ".join(shown) + more)
    if not row["references"]:
        return [*lines, "rewards: not tried, because the chat template writes the reference of a tool call"]
    return lines + describe_rewards(recipe, task, task.train.select([0]), reference, ids)


def describe_rewards(recipe: Recipe, task: Task, row: Dataset, reference: str, ids: list[int]) -> list[str]:
    """Return what each reward gives for the reference and for an empty answer.

    Raises:
        RewardError: a reward that fails.
    """
    rewards, lines = build_rewards(recipe.ppo.rewards, task.language), []
    handling = recipe.ppo.reward_handling
    right = compute_row_rewards(rewards, row, [reference], [ids], handling).by_name
    empty = compute_row_rewards(rewards, row, [""], [[]], handling).by_name
    for name, values in right.items():
        numbers = values.item(), empty[name].item()
        lines.append(f"reward {name}: {numbers[0]:.3f} for the reference, {numbers[1]:.3f} for an empty answer")
        if numbers[0] <= numbers[1]:
            lines.append(f"warning: {name} does not prefer the reference to an empty answer")
    return lines


def _rendered(prompt: str | list, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a prompt as the model reads it; without a tokenizer the messages of a chat."""
    if isinstance(prompt, str):
        return prompt
    return plain_text(prompt) if tokenizer is None else render_chat(tokenizer, prompt, generation_prompt=True)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()] or ["  "]
