"""The task of a recipe as all its stages see it: prompts as chats or plain texts, and rows that the model can take."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.loading import load_config, load_tokenizer, plain_model_directory
from pipeline.models.prompt_lengths import check_prompt_lengths, unfit_prompts
from pipeline.models.prompts import encode_prompts_of
from pipeline.models.text import (
    TEMPLATE_DATE,
    chat_problems,
    chat_problems_of,
    decode,
    encode_completions,
    plain_text,
    without_thoughts,
    writes_date,
)
from pipeline.recipe import Recipe
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.messages import one_line, say
from pipeline.stages.directory import RunDirectory
from pipeline.stages.lengths import with_lengths
from pipeline.stages.rows import splits_of, without_rows
from pipeline.stages.speech import spoken_languages, with_clips
from pipeline.tasks import Task, TaskError, columns, load_task, parallel
from pipeline.tasks.types import TaskConfig


@dataclass(frozen=True)
class PromptChoice:
    """Whether plain prompts become chats, and why, in words that follow `prompts:`."""

    chat: bool
    reason: str


def choose_prompts(recipe: Recipe) -> PromptChoice | None:
    """Decide whether the plain prompts of a task become chats; None where the task's own rows decide.

    Raises:
        ValueError: chats are asked for and the model has no chat template, or `task.system` would do nothing.
    """
    config = recipe.task.config
    if not isinstance(config, columns.Config | parallel.Config):
        return None
    if isinstance(config, columns.Config) and config.messages is not None:
        return None
    if config.chat is False:
        return PromptChoice(False, "plain texts stay as they are (task.chat is false)")
    has_template = _has_template(recipe)
    if config.chat is True and not has_template:
        raise TaskError("task.chat: true needs a chat template, and the tokenizer has none; set model.chat_template")
    from_scratch = recipe.model.from_scratch is not None and not recipe.sft_is_external
    chat = config.chat is True or (has_template and not from_scratch)
    if not chat and config.system is not None:
        raise TaskError(
            "task.system: it would do nothing: prompts are plain texts, because the model "
            f"{'is built from scratch' if from_scratch else 'has no chat template'}; remove it, or set "
            f"{'task.chat: true and ' * from_scratch}model.chat_template"
        )
    if chat:
        because = "" if config.chat is True else "the model has a chat template, and "
        may_be_chats = isinstance(config, columns.Config) and not config.prompt_columns  # a column, no template
        texts = "chats stay as they are, and plain texts" if may_be_chats else "plain texts"
        return PromptChoice(
            True, f"{texts} become the turn of a user in a chat ({because}task.chat is {str(config.chat).lower()})"
        )
    because = "is built from scratch" if from_scratch else "has no chat template"
    return PromptChoice(False, f"plain texts stay as they are (the model {because})")


def _has_template(recipe: Recipe) -> bool:
    if recipe.sft_is_external:
        path = recipe.ppo.sft_model_path
    elif recipe.model.from_scratch is not None:
        return recipe.model.chat_template is not None
    else:
        path = recipe.model.model_name_or_path
    return load_tokenizer(path, recipe.model).chat_template is not None


def load_recipe_task(recipe: Recipe, run: RunDirectory) -> tuple[Recipe, Task]:
    """Load the recipe's task as its model reads it, and print which rows are left out.

    Returns:
        The recipe with every length set, and the task.

    Raises:
        TaskError: as `load_task`; a row that the model cannot take, unless `task.skip_broken_rows` leaves it out.
        ValueError: as `with_lengths`.
    """
    task = load_task(recipe.task.name, task_config(recipe))
    path = _tokenizer_path(recipe, run, task)
    tokenizer, config = load_tokenizer(path, recipe.model), load_config(path, recipe.model)
    task = _renderable(with_clips(task, tokenizer, config), tokenizer)
    recipe = with_lengths(recipe, task, tokenizer, config)
    task = fit_rows(recipe, task, tokenizer, config)
    say_left_out("task", task.left_out)
    if isinstance(recipe.task.config, columns.Config):
        say(*filter(None, [columns.thoughts_warning(recipe.task.config, task.train)]))
    return recipe, task


def task_config(recipe: Recipe) -> TaskConfig:
    """Return the configuration of the task, with `chat` decided."""
    choice = choose_prompts(recipe)
    return recipe.task.config if choice is None else replace(recipe.task.config, chat=choice.chat)


def _tokenizer_path(recipe: Recipe, run: RunDirectory, task: Task) -> Path | str:
    """Return a model with the tokenizer that the stages read prompts by; a from-scratch one is built."""
    if recipe.model.from_scratch is not None and (not recipe.sft_is_external or "base" in recipe.eval.systems):
        columns_read = ("prompt", "completion") if task.sound is None else ("completion",)
        texts = [text for column in columns_read for text in map(plain_text, task.train[column])]
        build_from_scratch(recipe.model.from_scratch, texts, recipe.seed, run.base, spoken_languages(task))
    return recipe.ppo.sft_model_path if recipe.sft_is_external else base_model_path(recipe, run)


def base_model_path(recipe: Recipe, run: RunDirectory) -> Path | str:
    """Return the model that SFT starts from; `load_recipe_task` builds one from scratch."""
    path = recipe.model.model_name_or_path
    return run.base if recipe.model.from_scratch is not None else run.find_model(path, recipe)


def sft_base(recipe: Recipe, run: RunDirectory, directory: Path) -> Path | str:
    """Return the same with plain weights: an adapter is merged into its base, in `directory`, for another over it."""
    path = base_model_path(recipe, run)
    return plain_model_directory(path, recipe.model, directory / "base") if recipe.sft.use_peft else path


def _renderable(task: Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return the task without the rows that the chat template cannot render.

    Raises:
        TaskError: there are some and `task.skip_broken_rows` is false, or no other rows.
    """
    for name in splits_of(task):
        task = without_rows(task, name, chat_problems_of(tokenizer, getattr(task, name)))
    return task


def fit_rows(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Task:
    """Return the task without the rows whose prompts leave no room for a completion, and with all references.

    Raises:
        TaskError: no row would be left.
        ValueError: as `check_prompt_lengths`, unless `task.skip_broken_rows` is true.
    """
    room = _tokens_to_generate(recipe, task)
    for name in splits_of(task):
        if name in room:
            task = _with_room(task, name, *room[name], tokenizer, config)
        task = replace(task, **{name: _with_references(task, getattr(task, name), tokenizer)})
    _check_reference(task, tokenizer)
    return task


def _check_reference(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot render the first reference as an answer, which the evaluation does.

    Completions that begin with a thought may be rendered where a reference without it cannot.

    Raises:
        TaskError: what the template says.
    """
    row = task.test[0]
    [problem] = chat_problems(tokenizer, [row["prompt"]], [row["references"][0]])
    if problem is not None:
        key = "task.strip_thoughts" if task.strip_thoughts else "task.references"
        raise TaskError(f"{key}: a reference cannot be an answer in a chat: {problem}, in {task.where('test', [0])}")


def _with_room(
    task: Task,
    split: str,
    key: str,
    length: int,
    first: int,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> Task:
    """Return the task without the `first` rows of a split whose prompts leave no room for `length` tokens.

    Raises:
        ValueError: there are some and `task.skip_broken_rows` is false.
    """
    rows = getattr(task, split)
    prompts = encode_prompts_of(tokenizer, rows.select(range(min(first, len(rows)))), config.is_encoder_decoder)
    if task.skip_broken_rows:
        reasons = unfit_prompts(prompts, length, config, key)
        return without_rows(task, split, [reasons.get(row) for row in range(len(rows))])
    check_prompt_lengths(prompts, length, config, key, split, partial(task.where, split))
    return task


def _tokens_to_generate(recipe: Recipe, task: Task) -> dict[str, tuple[str, int, int]]:
    """Return for each split that is answered the key that says how long, the tokens, and how many of its rows are."""
    room = {"test": ("eval.max_new_tokens", recipe.eval.max_new_tokens, len(task.test))}
    prompts = "train" if task.ppo_prompts is None else "ppo_prompts"
    if recipe.reward is not None and isinstance(recipe.reward.pairs, SampledPairs):
        pairs = recipe.reward.pairs
        held_out = ("reward.pairs.max_new_tokens", pairs.max_new_tokens, pairs.held_out_prompts or sys.maxsize)
        room |= {prompts: ("reward.pairs.max_new_tokens", pairs.max_new_tokens, pairs.prompts or sys.maxsize)}
        room |= {"validation": held_out}
    if recipe.ppo is not None:
        length = recipe.ppo.response_length
        room |= {prompts: ("ppo.response_length", length, len(task.prompts))}
        if recipe.sft.best_of_n is not None:
            room |= {"train": ("ppo.response_length", length, len(task.train))}
        room |= {"validation": ("ppo.response_length", length, recipe.ppo.eval_examples or sys.maxsize)}
    return room


def _with_references(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Write out the references of answers that are tool calls, and strip thoughts from references."""
    calls = any(not references for references in rows["references"])
    if not calls and not task.strip_thoughts:
        return rows

    def write(batch: dict[str, list]) -> dict[str, list]:
        written = (
            decode(tokenizer, encode_completions(tokenizer, batch["prompt"], batch["completion"])) if calls else ()
        )
        references = [texts or [written[row]] for row, texts in enumerate(batch["references"])]
        return {
            "references": [[without_thoughts(t) if task.strip_thoughts else t for t in texts] for texts in references]
        }

    return rows.map(write, batched=True, features=rows.features, desc="Writing references")


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


def template_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what stage.json holds of a chat template that asks for the date: the one date that it gets."""
    return {"chat_template_date": f"{TEMPLATE_DATE:%Y-%m-%d}"} if writes_date(tokenizer) else {}
