"""The types all tasks share."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from datasets import Dataset

SPLITS = ("train", "validation", "test")
RESERVED_COLUMNS = ("prompt", "completion", "references")
CHAT_CHOICES = ("auto", "true", "false")
Where = Callable[[Sequence[int]], str]  # row numbers of a split -> where these rows are in the data


class TaskError(ValueError):
    """Data that cannot be used; the message names the key or file, what was found and what to do."""


class TaskConfig(Protocol):
    """Every kind of task's `Config`: a dataclass with these two keys, and keys of its own."""

    @property
    def language(self) -> str | None:
        """Return the language of the completions (an ISO 639-1 code), where known."""

    @property
    def ppo_examples(self) -> int | None:
        """Return how many training rows are kept from SFT for PPO; None where both train on the same rows."""


@dataclass(frozen=True)
class Task:
    """Three splits with the columns `prompt`, `completion` (the text SFT learns) and `references` (list of texts).

    `ppo_prompts` are training rows that SFT does not see, kept for PPO; without them PPO answers the rows of `train`.

    `prompt` is a text or a list of chat messages, of which the first may hold `tools`. `completion` is a text, or a
    list of one assistant message with tool calls; `references` may then be empty, and are what the model's chat
    template makes of that message. Every further column travels to the reward functions.
    `left_out` says where each row without an example is, and why it has none; `places` where the rows of a split are.
    `language` is that of the completions (an ISO 639-1 code), where known: metrics choose their tokenizer by it.
    `sound` is the column that holds what a speech model hears of each row, as `pipeline.models.audio` reads it.
    `system` is what chats without a system message begin with. With `strip_thoughts` rewards and metrics do not see a
    `<think>...</think>` at the start of a completion; with `skip_broken_rows` rows that the model cannot take are left
    out instead of refused. Test rows with the same value in the column `cluster` belong together: the report resamples
    them as a whole.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    language: str | None = None
    ppo_prompts: Dataset | None = None
    left_out: tuple[str, ...] = ()
    places: Mapping[str, Where] = field(default_factory=dict)
    system: str | None = None
    strip_thoughts: bool = False
    skip_broken_rows: bool = False
    cluster: str | None = None
    sound: str | None = None

    def __post_init__(self) -> None:
        if self.cluster is not None and self.cluster not in self.test.column_names:
            columns = ", ".join(self.test.column_names)
            raise TaskError(f"task.cluster: the test rows have no column {self.cluster!r}; there are: {columns}")

    def where(self, split: str, rows: Sequence[int]) -> str:
        """Return where rows of a split (or of `ppo_prompts`) are in the data, the first three of them by number."""
        if split in self.places:
            return self.places[split](rows)
        numbers = ", ".join(map(str, rows[:3])) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
        return f"row{'s' * (len(rows) > 1)} {numbers} of the {split} split (the first is row 0)"

    @property
    def prompts(self) -> Dataset:
        """Return the rows whose prompts PPO answers."""
        return self.train if self.ppo_prompts is None else self.ppo_prompts


def hold_out(task: Task, count: int | None) -> Task:
    """Keep the last `count` training rows from SFT, for PPO.

    On rows that a model has learnt by heart, rewards measure its memory; on other rows they measure its skill.

    Raises:
        TaskError: no row would be left for SFT.
    """
    if not count:
        return task
    rows = len(task.train)
    if count >= rows:
        raise TaskError(f"task.ppo_examples: must be below the {rows} training examples, found {count}")
    kept = rows - count
    train, prompts = task.train.select(range(kept)), task.train.select(range(kept, rows))
    places = dict(task.places)
    if "train" in places:
        places["ppo_prompts"] = lambda chosen: task.places["train"]([kept + row for row in chosen])
    return replace(task, train=train, ppo_prompts=prompts, places=places)


def make_split(rows: list[dict[str, Any]], split: str, limit: int | None) -> Dataset:
    """Make a split of rows that have at least prompt, completion and references: the first `limit` of them."""
    if not rows:
        raise TaskError(f"task: the {split} split is empty")
    return Dataset.from_list(rows[:limit] if limit else rows)


def check_limits(**limits: int | None) -> None:
    """Refuse a row limit below 1."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise TaskError(f"task.{name}: must be at least 1, found {value}")


def check_chat(chat: object, system: str | None) -> None:
    """Refuse a value of `task.chat` that is none, and a system message that no prompt would have."""
    if not isinstance(chat, bool) and chat != "auto":
        raise TaskError(f"task.chat: {chat!r} is not one of {', '.join(CHAT_CHOICES)}")
    if chat is False and system is not None:
        raise TaskError("task.system: it would do nothing: with task.chat: false prompts are plain texts")


def check_widths(template: str, key: str) -> None:
    """Refuse a template whose fields ask for a width that would fill the memory, or take one from the data.

    Raises:
        TaskError: naming the template.
    """
    if re.search(r"\{[^{}]*:[^{}]*([0-9]{5}|\{)", template):
        raise TaskError(
            f"{key}: the template {template[:200]!r} has a field of a width beyond 9999, or of another field's"
        )


def render(template: str, row: dict[str, Any], key: str = "task.prompt") -> str:
    """Fill each `{column}` of a template with the row's value.

    Raises:
        TaskError: a column the row does not have, or a stray brace.
    """
    check_widths(template, key)
    try:
        return template.format(**row)
    except KeyError as error:
        raise TaskError(
            f"{key}: no column {error.args[0]!r} for the template {template!r}; there are: {', '.join(map(str, row))}"
        ) from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise TaskError(f"{key}: the template {template!r} is not valid ({error}); write {{{{ for a brace") from error
