"""Read chat messages in the shapes that data sets have: OpenAI's, ShareGPT's, and those that a recipe maps."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.tasks.examples import (
    Unusable,
    column_of,
    describe_value,
    messages_as_text,
    placeholders,
    require_text,
)
from pipeline.tasks.text_rows import Row

Message = dict[str, Any]
# The keys of a message besides role and content that chat templates read.
FURTHER_KEYS = ("tool_calls", "tool_call_id", "name")
# ShareGPT's names: the keys of role and content, then of each role.
SHAREGPT = {"role": "from", "content": "value"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
SHAREGPT_ROLES |= {"observation": "tool"}
FOREIGN_ROLES = ("human", "prompter", "gpt", "chatgpt", "bot")  # names that chat templates leave out or refuse
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages whose thoughts are not in their content
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")


def as_user_turn(prompt: str) -> list[Message]:
    """Return a plain prompt as the turn of a user, without the white space around it.

    A transcript from `Human:` to a last, empty `Assistant:` is returned as its turns.
    """
    head, mark, answer = prompt.strip().rpartition("Assistant:")
    if mark and not answer and head.startswith("Human:"):
        return transcript_turns(head)
    return [{"role": "user", "content": prompt.strip()}]


def transcript_turns(transcript: str) -> list[Message]:
    """Return the turns of a transcript of `Human:` and `Assistant:`, each after an empty line.

    Raises:
        Unusable: it does not begin with one of them.
    """
    start, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript.strip())
    if start.strip() or not turns:
        raise Unusable("a transcript does not begin with Human:")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": TRANSCRIPT_ROLES[role], "content": text.strip()} for role, text in pairs]


def split_transcripts(texts: Sequence[str], as_chat: bool) -> tuple[str | list[Message], list[str]]:
    """Return the prompt that two transcripts share, up to the last `Assistant:`, and the texts after it.

    Raises:
        Unusable: they are no transcripts of `Human:` and `Assistant:`, or differ before that.
    """
    heads, ends = zip(*(text.rpartition("\n\nAssistant:")[::2] for text in texts), strict=True)
    if not all(heads):
        raise Unusable(
            "without a prompt column, chosen and rejected must be chats of two messages or more, or transcripts of "
            "Human: and Assistant:; name the column of the prompt in reward.pairs.prompt"
        )
    if heads[0] != heads[1]:
        raise Unusable("chosen and rejected differ before the last Assistant:, so they answer different prompts")
    answers = [text.strip() for text in ends]
    if not as_chat:
        return f"{heads[0]}\n\nAssistant:", answers
    return transcript_turns(heads[0]), answers


def with_system(chat: Sequence[Message], system: str | None) -> list[Message]:
    """Return a chat with `system` as its first message, unless it begins with a system message."""
    if system is None or (chat and chat[0]["role"] == "system"):
        return list(chat)
    return [{"role": "system", "content": system}, *chat]


def system_of(row: Row, expressions: Iterable[str | None], system: str | None) -> str | None:
    """Return the text in the column `system` of a row, unless one of the `expressions` reads it; else `system`."""
    text = row.get("system")
    if not isinstance(text, str) or not text.strip():
        return system
    read = {column_of(field) for one in expressions if one for field in placeholders(one, "prompt") or [one]}
    return system if "system" in read else text


def with_tools(chat: Sequence[Message], tools: object) -> list[Message]:
    """Return a chat whose first message holds the tools, which the chat template gets apart from the messages.

    Raises:
        Unusable: the tools are no list of functions, nor the JSON of one.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise Unusable(
                f"the tools are a text that is not JSON ({error}); name their column in task.tools, or set "
                "task.tools: null where the data have none"
            ) from error
    if not tools:
        return list(chat)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(
            "its tools are no list of functions; name their column in task.tools, or set task.tools: null where the "
            f"data have none, found {str(tools)[:60]!r}"
        )
    return [{**chat[0], "tools": without_nulls(tools)}, *chat[1:]]


def read_messages(column: str, row: Row, names: Mapping[str, str] | None = None) -> list[Message]:
    """Return the messages in a column, each with a role, a content, and tool calls where it has some.

    `names` says what the data call `role` and `content`, and may map names of roles (`customer: user`). Without it
    messages of `from` and `value` are read as ShareGPT's.

    Raises:
        Unusable: no list of messages with a role and a content.
    """
    messages = row.get(column)
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        raise messages_as_text(column)
    if not isinstance(messages, list):
        raise Unusable(f"the column {column!r} {describe_value(messages)}, expected a list of messages")
    if names is None and is_sharegpt(messages):
        names = SHAREGPT
    names = {} if names is None else {**SHAREGPT_ROLES, **names}
    return [_read_message(message, column, names) for message in messages]


def split_answer(chat: Sequence[Message], column: str) -> tuple[list[Message], Message]:
    """Return the messages before the last one of the assistant, and that message.

    Raises:
        Unusable: there is none, it is empty, or nothing but system messages is before it.
    """
    answers = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    if not answers:
        raise Unusable(f"the column {column!r} has no message of the role assistant")
    prompt, answer = list(chat[: answers[-1]]), chat[answers[-1]]
    if all(message["role"] == "system" for message in prompt):
        raise Unusable(f"the column {column!r} has no message before the assistant's")
    if "tool_calls" not in answer and not answer["content"].strip():
        raise Unusable(f"the last message of the assistant in the column {column!r} is empty")
    return prompt, answer


def thought_key(chats: Iterable[object]) -> str | None:
    """Return the key by which messages hold thoughts apart from their content, which no example has; None without."""
    messages = (message for chat in chats if isinstance(chat, list) for message in chat if isinstance(message, dict))
    return next((key for message in messages for key in THOUGHT_KEYS if message.get(key)), None)


def join_turns(prompt: Sequence[Message], completion: Sequence[Message]) -> list[Message]:
    """Return the turns of a prompt and those of its completion, which may be a whole chat that repeats the prompt."""

    def texts(chat: Sequence[Message]) -> list[tuple[str, str]]:
        return [(message["role"], str(message["content"]).strip()) for message in chat if message["role"] != "system"]

    turns = texts(prompt)
    if texts(completion)[: len(turns)] != turns:
        return [*prompt, *completion]
    system = [message for message in prompt[:1] if message["role"] == "system"]
    return list(completion) if completion[0]["role"] == "system" else [*system, *completion]


def is_sharegpt(messages: object) -> bool:
    """Tell whether something is a list of messages that all have `from` and `value`, and no role."""

    def has_names(message: object) -> bool:
        is_message = isinstance(message, dict) and message.get("role") is None
        return is_message and message.get("from") is not None and "value" in message

    return isinstance(messages, list) and bool(messages) and all(map(has_names, messages))


def _read_message(message: object, column: str, names: Mapping[str, str]) -> Message:
    if not isinstance(message, dict):
        raise Unusable(f"a message in the column {column!r} {describe_value(message)}, expected a role and a content")
    keys = {key: names.get(key, key) for key in ("role", "content")}
    calls = message.get("tool_calls")
    missing = [key for key in keys.values() if key not in message and not (calls and key == keys["content"])]
    if missing:
        raise Unusable(
            f"a message in the column {column!r} has {', '.join(message)}, expected {' and '.join(keys.values())}; "
            "name its keys in task.messages_from, such as {role: from, content: value}"
        )
    role = require_text(message[keys["role"]], "the role of a message")
    read: Message = {"role": names.get(role, role), "content": _joined_parts(message.get(keys["content"]))}
    if (names or role in FOREIGN_ROLES) and read["role"] not in ROLES:
        raise Unusable(
            f"a message in the column {column!r} has the role {role!r}; map it to one of {', '.join(ROLES)} in "
            f"task.messages_from, such as {{{_hint(keys, names, role)}}}"
        )
    if calls:
        read["tool_calls"] = [_read_call(call, column) for call in calls]
    if not calls or read["content"] is not None:
        require_text(read["content"], "the content of a message")
    return read | {key: message[key] for key in FURTHER_KEYS[1:] if message.get(key) is not None}


def _joined_parts(content: object) -> object:
    """Return the text of a content in parts, as OpenAI's interface has it; any other content as it is.

    Raises:
        Unusable: a part is no text, such as an image.
    """
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    others = [str(part["type"]) for part in content if part["type"] != "text" or not isinstance(part.get("text"), str)]
    if others:
        raise Unusable(f"the content of a message has a part of the type {others[0]!r}; only texts can be read")
    return "".join(part["text"] for part in content)


def _hint(keys: Mapping[str, str], names: Mapping[str, str], role: str) -> str:
    """Return what task.messages_from may be: what it is, and one role more."""
    mapped = {key: name for key, name in names.items() if key not in keys and SHAREGPT_ROLES.get(key) != name}
    likely = "assistant" if any(part in role for part in ("call", "bot", "gpt")) else "user"
    return ", ".join(f"{key}: {name}" for key, name in {**keys, **mapped, role: likely}.items())


def _read_call(call: object, column: str) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, which is what chat templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(f"a tool call in the column {column!r} has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # a text that is no JSON stays a text
            arguments = json.loads(arguments) if arguments.strip() else {}
    function = without_nulls({**function, "arguments": arguments})
    return without_nulls({**call, "function": function} if "function" in call else function)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null: reading tables adds those that other rows have."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value
