"""Read preference data by its columns: a prompt, the better and the worse of two answers, and by how much."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.tasks import columns
from pipeline.tasks.examples import (
    Message,
    Reader,
    Unusable,
    check_columns,
    leave_out,
    read_prompt,
    read_row,
    read_text,
)
from pipeline.tasks.parts import select_part
from pipeline.tasks.text_rows import Row
from pipeline.tasks.types import TaskError, check_limits

PARTS = ("train", "validation")


@dataclass(frozen=True)
class Config:
    """Say where the pairs are, and which columns make one: the keys of `reward.pairs` with a `path`.

    `path`, `data_dir`, `subset`, `revision`, `train` and `validation` are those of the task `columns`. `prompt` is a
    column of texts or chat messages, or a template with `{column}` in it; null where `chosen` and `rejected` are
    chats that begin with it. `chosen` and `rejected` are columns of texts or chats, of which the last message counts;
    `margin` is a column of numbers: by how much chosen is better. `skip_broken_rows` is that of the task `columns`.
    """

    path: str  # as in the task columns
    data_dir: str = "."  # likewise
    subset: str | None = None  # likewise
    revision: str | None = None  # likewise
    train: str = "train"  # likewise
    validation: str = "validation"  # likewise: the held-out pairs
    prompt: str | None = "prompt"  # a column or a template; None: chosen and rejected are chats that begin with it
    chosen: str = "chosen"  # a column of texts or chats, of which the last message counts
    rejected: str = "rejected"  # likewise
    margin: str | None = None  # a column of numbers: by how much chosen is better
    min_margin: float = 0.0  # drop pairs below it
    max_train_pairs: int | None = None  # keep the first pairs only
    max_validation_pairs: int | None = None  # likewise
    skip_broken_rows: bool = False  # as in the task columns

    def __post_init__(self) -> None:
        limits = {f"max_{part}_pairs": getattr(self, f"max_{part}_pairs") for part in PARTS}
        with_named_keys(lambda: check_limits(**limits))
        if not self.min_margin >= 0:
            raise TaskError(f"reward.pairs.min_margin: must not be negative, found {self.min_margin}")
        if self.min_margin and self.margin is None:
            raise TaskError("reward.pairs.min_margin: it would do nothing, because no column is named in margin")
        with_named_keys(lambda: self.as_columns)

    @property
    def as_columns(self) -> columns.Config:
        """Return the configuration by which the task `columns` reads the same data; the test split is not used."""
        return columns.Config(
            path=self.path,
            data_dir=self.data_dir,
            subset=self.subset,
            revision=self.revision,
            train=self.train,
            validation=self.validation,
            test=self.validation,
            prompt=self.chosen if self.prompt is None else self.prompt,
            completion=self.chosen,
            skip_broken_rows=self.skip_broken_rows,
        )


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt (a text or chat messages), the better one first; `margin` where the data has one."""

    prompt: str | list[Message]
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True)
class Preferences:
    """The pairs of both parts; `left_out` says where each row without a pair is, and why it has none."""

    train: list[Preference]
    validation: list[Preference]
    left_out: tuple[str, ...] = ()


def with_named_keys(read: Any) -> Any:
    """Return `read()`; its error messages name `reward.pairs` instead of the task section.

    Raises:
        TaskError: what `read` raised.
    """
    try:
        return read()
    except TaskError as error:
        raise TaskError(str(error).replace("task.", "reward.pairs.").replace("task:", "reward.pairs:")) from error


def files(config: Config) -> list[Path]:
    """Return every local file the pairs are read from.

    Raises:
        TaskError: as `columns.files`.
    """
    return with_named_keys(lambda: columns.files(config.as_columns))


def check_reachable(config: Config) -> None:
    """Refuse a Hub data set that cannot be had.

    Raises:
        TaskError: as `columns.check_reachable`.
    """
    with_named_keys(lambda: columns.check_reachable(config.as_columns))


def load(config: Config) -> Preferences:
    """Read the pairs of `train` and `validation`.

    Raises:
        TaskError: a column that is not there, or values that give no pair, with the rows they are in.
    """
    return with_named_keys(lambda: _load(config))


def _load(config: Config) -> Preferences:
    tables = columns.read_tables(config.as_columns)
    broken = [line for part in PARTS for line in tables[part].broken]
    readers, pairs = _readers(config), {}
    for part in PARTS:
        table = select_part(tables[part], part, getattr(config, part), getattr(config, f"max_{part}_pairs"))
        for key, expression, _ in readers:
            check_columns(table, key, expression)
        rows = [read_row(readers, row) for row in table.dataset]
        table, kept = leave_out(table, [problem for _, problem in rows], config.skip_broken_rows)
        pairs[part] = [Preference(*rows[index][0]) for index in kept]
        broken += table.broken
    left_out = (line.replace("task.", "reward.pairs.") for line in dict.fromkeys(broken))
    return Preferences(**pairs, left_out=tuple(left_out))


def _readers(config: Config) -> list[Reader]:
    """Return a reader of everything that makes a pair: prompt, chosen, rejected, margin."""
    readers: list[Reader] = [
        ("chosen", config.chosen, partial(_shared_prompt, rejected=config.rejected))
        if config.prompt is None
        else ("prompt", config.prompt, _prompt),
        ("chosen", config.chosen, _answer),
        ("rejected", config.rejected, _answer),
    ]
    return readers if config.margin is None else [*readers, ("margin", config.margin, _margin)]


def _prompt(name: str, row: Row) -> str | list[Message]:
    value = row.get(name)
    if isinstance(value, list):
        return [_message(message, name) for message in value]
    return read_prompt(name, row)


def _answer(name: str, row: Row) -> str:
    value = row.get(name)
    if not isinstance(value, list):
        return read_text(name, row)
    if not value or _message(value[-1], name)["role"] != "assistant":
        raise Unusable(f"the chat in the column {name!r} does not end with a message of the role assistant")
    return value[-1]["content"]


def _shared_prompt(chosen: str, row: Row, rejected: str) -> list[Message]:
    chats = [row.get(name) for name in (chosen, rejected)]
    if not all(isinstance(chat, list) and len(chat) > 1 for chat in chats):
        raise Unusable("without a prompt column, chosen and rejected must be chats of two messages or more")
    starts = [[_message(message, chosen) for message in chat[:-1]] for chat in chats]
    if starts[0] != starts[1]:
        raise Unusable("chosen and rejected differ before their last message, so they answer different prompts")
    return starts[0]


def _message(message: object, column: str) -> Message:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise Unusable(f"a message in the column {column!r} has no role and content that are texts")
    return {"role": message["role"], "content": message["content"]}


def _margin(name: str, row: Row) -> float:
    value = row.get(name)
    try:
        number = float("nan") if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):  # the last: a whole number of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise Unusable(f"the margin is not a finite number ({repr(value)[:80]})")
    if number < 0:
        raise Unusable(f"the margin is negative ({number:g}), as if chosen and rejected were swapped")
    return number
