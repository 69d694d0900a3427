"""Read preference data by its columns: a prompt, the better and the worse of two answers, and by how much."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.tasks import columns
from pipeline.tasks.chats import (
    Message,
    as_user_turn,
    read_messages,
    split_transcripts,
    system_of,
    with_system,
    with_tools,
)
from pipeline.tasks.examples import (
    Reader,
    Unusable,
    check_columns,
    labels_of,
    leave_out,
    read_prompt,
    read_row,
    read_text,
    with_label_names,
)
from pipeline.tasks.known_shapes import pair_keys, prompt_of_pairs
from pipeline.tasks.parts import select_part
from pipeline.tasks.text_rows import Row
from pipeline.tasks.types import TaskError, Where, check_limits

PARTS = ("train", "validation")
Read = tuple[list[Any], str | None]  # what the readers made of a row, and why it gives no pair


@dataclass(frozen=True)
class Config:
    """Say where the pairs are, and which columns make one: the keys of `reward.pairs` with a `path`.

    `path`, `data_dir`, `subset`, `revision`, `train` and `validation` are those of the task `columns`. `prompt` is a
    column of texts or chat messages, or a template with `{column}` in it. `chosen` and `rejected` are columns of texts
    or chats, of which the last message is the answer; messages before it are the prompt, and are the same in both.
    With null, or data without a column of that name, the prompt is what both begin with: the chats' messages, or in
    transcripts of `Human:` and `Assistant:` all up to the last `Assistant:`. `margin` is a column of numbers: by how
    much chosen is better. `messages_from` and `skip_broken_rows` are those of the task `columns`.
    """

    path: str  # as in the task columns
    data_dir: str = "."  # likewise
    subset: str | None = None  # likewise
    revision: str | None = None  # likewise
    train: str = "train"  # likewise
    validation: str = "validation"  # likewise: the held-out pairs
    prompt: str | None = "prompt"  # a column or a template; None: what chosen and rejected both begin with
    chosen: str = "chosen"  # a column of texts or chats, of which the last message is the answer
    rejected: str = "rejected"  # likewise
    messages_from: Mapping[str, str] | None = None  # as in the task columns
    margin: str | None = None  # a column of numbers: by how much chosen is better
    min_margin: float = 0.0  # drop pairs below it
    max_train_pairs: int | None = None  # keep the first pairs only
    max_validation_pairs: int | None = None  # likewise
    skip_broken_rows: bool = False  # as in the task columns

    def __post_init__(self) -> None:
        limits = {f"max_{split}_pairs": getattr(self, f"max_{split}_pairs") for split in PARTS}
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
class PromptForm:
    """How the prompts of a task are written: as plain texts, or as chats that begin with `system` where it is set.

    `tools` is the column with the tools of a chat, if the data have it.
    """

    chat: bool
    system: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt (a text or chat messages), the better one first; `margin` where the data has one."""

    prompt: str | list[Message]
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True)
class Preferences:
    """The pairs of both parts.

    `left_out` says where each row without a pair is, and why it has none; `places` where the rows of a part are.
    """

    train: list[Preference]
    validation: list[Preference]
    left_out: tuple[str, ...] = ()
    places: Mapping[str, Where] = field(default_factory=dict)


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


def load(config: Config, form: PromptForm | None = None) -> Preferences:
    """Read the pairs of `train` and `validation`, with prompts in the form of the task's; without `form` as they are.

    Raises:
        TaskError: a column that is not there, or values that give no pair, with the rows they are in.
    """
    return with_named_keys(lambda: _load(config, form))


def _load(config: Config, form: PromptForm | None) -> Preferences:
    tables = columns.read_tables(config.as_columns)
    broken = [line for part in PARTS for line in tables[part].broken]
    pairs, places = {}, {}
    for part in PARTS:
        table = select_part(tables[part], part, getattr(config, part), getattr(config, f"max_{part}_pairs"))
        has_prompt = config.prompt is not None and (
            config.prompt != Config.prompt or config.prompt in table.dataset.column_names
        )
        read = replace(config, prompt=config.prompt if has_prompt else None)
        for key in ("prompt", "chosen", "rejected", "margin"):
            if getattr(read, key) is not None:
                check_columns(table, key, getattr(read, key), pair_keys)
        readers: list[Reader] = [("chosen", config.chosen, partial(_read_pair, config=read, form=form))]
        readers += [] if config.margin is None else [("margin", config.margin, _margin)]
        labels = labels_of(table.dataset.features)
        rows = [read_row(readers, with_label_names(row, labels)) for row in table.dataset]
        rows = without_repeated_prompts(rows)
        table, kept = leave_out(table, [problem for _, problem in rows], config.skip_broken_rows)
        pairs[part] = [Preference(*rows[index][0][0][:3], *rows[index][0][1:]) for index in kept]
        places[part] = table.where
        broken += table.broken
    left_out = (line.replace("task.", "reward.pairs.") for line in dict.fromkeys(broken))
    return Preferences(**pairs, left_out=tuple(left_out), places=places)


def _read_pair(
    name: str, row: Row, config: Config, form: PromptForm | None
) -> tuple[str | list[Message], str, str, str]:
    """Return the prompt of a row, its two answers, and the text that these may repeat: a prompt that is a text.

    Raises:
        Unusable: they do not answer one prompt, or the prompt is not in the form of the task's.
    """
    sides = [_read_side(side, row, config) for side in (config.chosen, config.rejected)]
    answers = [side if isinstance(side, str) else side[-1]["content"] for side in sides]
    starts = [side[:-1] for side in sides if not isinstance(side, str) and len(side) > 1]
    if len(starts) == 2 and starts[0] != starts[1]:
        raise Unusable("chosen and rejected differ before their last message, so they answer different prompts")
    prompt = None if config.prompt is None else _read_prompt(config, row)
    begin = prompt.strip() if isinstance(prompt, str) and not starts else ""
    if starts:
        prompt = starts[0] if prompt is None else _same_prompt(prompt, starts[0])
    elif prompt is None:
        try:
            prompt, answers = split_transcripts(answers, as_chat=form is not None and form.chat)
        except Unusable as error:
            column = prompt_of_pairs(row)
            raise Unusable(f"{error}{f', such as prompt: {column}' if column else ''}") from error
    if form is not None and form.chat:
        prompt = as_user_turn(prompt) if isinstance(prompt, str) else prompt
        prompt = with_system(prompt, system_of(row, (config.prompt, config.chosen, config.rejected), form.system))
        prompt = with_tools(prompt, None if form.tools is None else row.get(form.tools))
    elif form is not None and not isinstance(prompt, str):
        raise Unusable(
            "the prompt of a pair is a chat, and those of the task are plain texts, which a model reads differently; "
            "write chat: true or messages into the section of the task, or give pairs of texts"
        )
    return prompt, *answers, begin


def without_repeated_prompts(rows: Sequence[Read]) -> Sequence[Read]:
    """Remove the prompts from the answers of pairs whose answers all begin with their prompt: they are whole texts.

    A few answers may begin so by chance, and stay as they are where those of another pair do not.
    """
    pairs = [values[0] for values, problem in rows if problem is None]
    if not pairs or not all(begin and all(map(partial(_begins, begin), answers)) for _, *answers, begin in pairs):
        return rows

    def shorten(values: list[Any]) -> list[Any]:
        (prompt, *answers, begin), *rest = values
        return [(prompt, *(answer.lstrip().removeprefix(begin).strip() for answer in answers), begin), *rest]

    return [(shorten(values) if problem is None else values, problem) for values, problem in rows]


def _begins(begin: str, text: str) -> bool:
    return text.lstrip().startswith(begin)


def _read_prompt(config: Config, row: Row) -> str | list[Message]:
    if isinstance(row.get(config.prompt), list):
        return read_messages(config.prompt, row, config.messages_from)
    return read_prompt(config.prompt, row)


def _read_side(name: str, row: Row, config: Config) -> str | list[Message]:
    """Return an answer as a text, or as a chat that ends with it; one message stands for a chat of it."""
    value = row.get(name)
    if not isinstance(value, list | dict):
        return read_text(name, row)
    chat = read_messages(name, {name: value if isinstance(value, list) else [value]}, config.messages_from)
    if not chat or chat[-1]["role"] != "assistant":
        raise Unusable(f"the chat in the column {name!r} does not end with a message of the role assistant")
    if chat[-1]["content"] is None or "tool_calls" in chat[-1]:
        raise Unusable(f"the answer in the column {name!r} is a tool call, which is no text that can be compared")
    return chat


def _same_prompt(prompt: str | list[Message], start: list[Message]) -> list[Message]:
    """Return what the chats of a pair begin with, which has to hold the prompt.

    Raises:
        Unusable: the prompt is another one.
    """
    contents = [str(message["content"]).strip() for message in start]
    same = prompt.strip() in contents if isinstance(prompt, str) else start[-len(prompt) :] == prompt
    if not same:
        raise Unusable(
            "the prompt is not what the chats in chosen and rejected begin with; set prompt: null to use that"
        )
    return start


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
