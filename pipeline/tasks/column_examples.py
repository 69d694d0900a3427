"""Make the examples of one split of a table: prompt, completion and references, as texts or chats."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from pipeline.runtime.files import sha256
from pipeline.tasks.chats import (
    Message,
    as_user_turn,
    join_turns,
    read_messages,
    split_answer,
    system_of,
    with_system,
    with_tools,
)
from pipeline.tasks.column_config import Config
from pipeline.tasks.examples import (
    Reader,
    Unusable,
    check_columns,
    labels_of,
    leave_out,
    read_prompt,
    read_references,
    read_row,
    read_text,
    with_label_names,
)
from pipeline.tasks.tables import SourceTable
from pipeline.tasks.text_rows import Row
from pipeline.tasks.types import RESERVED_COLUMNS

# What reward functions get under names of their own beside the columns.
TRAINER_ARGUMENTS = ("trainer_state", "log_metric", "log_extra")
TAKEN_COLUMNS = (*RESERVED_COLUMNS, "prompts", "completions", "completion_ids", *TRAINER_ARGUMENTS)
SOURCE = "".join(sha256(Path(__file__).with_name(name)) for name in ("column_examples.py", "chats.py", "examples.py"))


def make_examples(config: Config, table: SourceTable) -> tuple[Dataset, SourceTable]:
    """Make the examples of a table; return them and the table of the same rows, which describes those left out."""
    readers = _readers(config)
    for key, expression, _ in readers:
        check_columns(table, key, expression)
    data = table.dataset
    names, text = _new_names(data.column_names), Value("string")
    chats, calls = _has_chats(config, data), _may_call_tools(config, data)
    features = Features(
        {
            "prompt": Json() if chats else text,
            "completion": Json() if calls else text,
            "references": List(text),
            "problem": text,
        }
        | {names[column]: data.features[column] for column in data.column_names}
    )
    read = partial(
        data.map,
        _example,
        fn_kwargs={
            "readers": readers,
            "labels": labels_of(data.features),
            "names": names,
            "config": config,
            "chats": chats,
            "calls": calls,
            "source": SOURCE,
        },
        remove_columns=data.column_names,
        features=features,
        load_from_cache_file=False,  # the functions that `_example` calls are no part of the cache's key
        desc="Reading examples",
    )
    try:
        examples = read()
    except OSError:  # a folder that cannot be written, or a full disk
        examples = read(keep_in_memory=True)
    table, kept = leave_out(table, examples["problem"][:], config.skip_broken_rows)
    examples = examples.remove_columns("problem")
    return examples if len(kept) == len(examples) else examples.select(kept), table


def _has_chats(config: Config, data: Dataset) -> bool:
    """Tell whether the prompts of a split are chats: by the recipe, or because the first row's column holds one."""
    if config.messages is not None or config.chat is True:
        return True
    return config.prompt in data.column_names and isinstance(
        data.select_columns(config.prompt)[0][config.prompt], list
    )


def _may_call_tools(config: Config, data: Dataset) -> bool:
    """Tell whether messages of a split hold tool calls: an answer is then no text."""
    column = config.completion if config.messages is None else config.messages
    kind = str(data.features[column]) if column in data.column_names else ""
    if "tool_calls" not in kind and "Json" not in kind:
        return False
    chats = (chat for chat in data.select_columns(column)[column] if isinstance(chat, list))
    return any(isinstance(message, dict) and message.get("tool_calls") for chat in chats for message in chat)


def _example(
    row: Row,
    readers: Sequence[Reader],
    labels: Mapping[str, Any],
    names: Mapping[str, str],
    config: Config,
    chats: bool,
    calls: bool,
    source: str,
) -> Row:
    """Return the prompt, completion and references of a row, and its columns under their new names.

    `source` changes with the code, and so does the key of what `datasets` caches of the examples, such as tokens.
    """
    values, problem = read_row(readers, with_label_names(row, labels))
    example = dict.fromkeys(("prompt", "completion", "references"))
    if problem is None:
        try:
            example |= make_example(dict(zip((key for key, _, _ in readers), values, strict=True)), row, config, chats)
            if calls and isinstance(example["completion"], str):  # one type for all rows of a column
                example["completion"] = [{"role": "assistant", "content": example["completion"]}]
        except Unusable as reason:
            problem = f"task.{_key_of_prompt(config)}: {reason}"
    return example | {"problem": problem} | {new: row[column] for column, new in names.items()}


def make_example(values: Row, row: Row, config: Config, chats: bool) -> Row:
    """Make prompt, completion and references of what the readers read from a row.

    Raises:
        Unusable: an empty completion, or a text where other rows have chats.
    """
    references, prompt, completion = values.get("references"), values.get("prompt"), values.get("completion")
    if config.messages is not None:
        prompt, completion = split_answer(values["messages"], config.messages)
    elif isinstance(completion, list):
        turns = prompt if isinstance(prompt, list) else as_user_turn(prompt)
        turns, completion = split_answer(join_turns(turns, completion), config.completion)
        prompt = prompt if isinstance(prompt, str) and len(turns) == 1 else turns
    elif isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with a message of the assistant, so it holds an answer; use task.messages")
    if isinstance(completion, dict):
        completion = [completion] if "tool_calls" in completion else completion["content"]
    if completion is None:
        completion = references[0]
    if isinstance(completion, str) and not completion.strip():
        raise Unusable("the completion is empty, and a model would learn to write nothing")
    if config.chat is True and isinstance(prompt, str):
        prompt = as_user_turn(prompt)
    if isinstance(prompt, list) != chats or (isinstance(completion, list) and not chats):
        raise Unusable(f"the prompt is a {'text' if chats else 'chat'}, and that of the first row is not")
    if chats:
        columns = (config.prompt, config.completion, config.references)
        prompt = with_system(prompt, system_of(row, columns, config.system))
        prompt = with_tools(prompt, None if config.tools is None else row.get(config.tools))
    return {
        "prompt": prompt,
        "completion": completion,
        "references": references or ([completion] if isinstance(completion, str) else []),
    }


def _key_of_prompt(config: Config) -> str:
    if config.messages is not None:
        return "messages"
    return "references" if config.completion is None else "completion"


def renamed_column(column: str, columns: Sequence[str]) -> str:
    """Return what a column of the data is called in the examples."""
    return _new_names(columns)[column]


def _new_names(columns: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for column in columns:
        name = column
        while name in TAKEN_COLUMNS or (name != column and name in columns):
            name = f"data_{name}"
        names[column] = name
    return names


def _readers(config: Config) -> list[Reader]:
    """Return a reader of everything that makes an example."""
    readers: list[Reader] = []
    chat = partial(read_messages, names=config.messages_from)
    if config.references is not None:
        readers.append(("references", config.references, read_references))
    if config.messages is not None:
        return [*readers, ("messages", config.messages, chat)]
    readers.append(("prompt", config.prompt, partial(_text_or_chat, read_prompt, chat)))
    completion = ("completion", config.completion, partial(_text_or_chat, read_text, chat))
    return readers if config.completion is None else [*readers, completion]


def _text_or_chat(
    read: Callable[[str, Row], str], chat: Callable[[str, Row], list[Message]], expression: str, row: Row
) -> str | list[Message]:
    """Read a column of chat messages as such, anything else as a text."""
    value = row.get(expression)
    is_chat = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return chat(expression, row) if is_chat else read(expression, row)
