"""The types all tasks share."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

SPLITS = ("train", "validation", "test")
RESERVED_COLUMNS = ("prompt", "completion", "references")


class TaskError(ValueError):
    """Data that cannot be used; the message names the key or file, what was found and what to do."""


@dataclass(frozen=True)
class Task:
    """Three splits with the columns `prompt`, `completion` (the text SFT learns) and `references` (list of texts).

    `prompt` is a text or a list of chat messages. Every further column travels to the reward functions.
    `language` is that of the completions (an ISO 639-1 code), where known: metrics choose their tokenizer by it.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    language: str | None = None


def make_split(rows: list[dict[str, Any]], split: str, limit: int | None) -> Dataset:
    """A split from rows that have at least prompt, completion and references, cut to the first `limit` rows."""
    if not rows:
        raise TaskError(f"task: the {split} split is empty")
    return Dataset.from_list(rows[:limit] if limit else rows)


def check_limits(**limits: int | None) -> None:
    """Refuse a row limit below 1."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise TaskError(f"task.{name}: must be at least 1, found {value}")


def render(template: str, row: dict[str, Any], key: str = "task.prompt") -> str:
    """`template` with each `{column}` replaced by the row's value.

    Raises:
        TaskError: a column the row does not have, or a stray brace.
    """
    try:
        return template.format(**row)
    except KeyError as error:
        raise TaskError(
            f"{key}: no column {error.args[0]!r} for the template {template!r}; there are: {', '.join(map(str, row))}"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise TaskError(f"{key}: the template {template!r} is not valid ({error}); write {{{{ for a brace") from error
