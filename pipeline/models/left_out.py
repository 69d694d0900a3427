"""What a chat template leaves out of a chat without a word: messages of roles that it does not know, tools, calls."""

from collections.abc import Callable, Sequence
from typing import Any

Messages = list[dict[str, Any]]
ANSWERING = ("assistant", "tool")  # templates may leave out thoughts of earlier answers, and what tools returned
KNOWN = ("system", "user")


def functions_problem(messages: Messages, tools: Sequence[dict[str, Any]] | None, text: str) -> str | None:
    """Say which tools or tool calls of a chat are not in the rendered text; None where all are."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    for kind, functions in (("tool_calls", calls), ("tools", tools or [])):
        names = [str(function.get("function", function).get("name")) for function in functions]
        if missing := [function for function in names if function not in text]:
            return (
                f"leaves out the {kind} of a chat ({', '.join(missing[:3])}); set model.chat_template to one that "
                "writes them, or use another model"
            )
    return None


def message_problem(messages: Messages, text: str, render: Callable[[Messages], str]) -> str | None:
    """Say which message of a chat is not in the rendered text; None where all are.

    A template may write a message in its own way. It is left out where another content gives the same text.
    """
    for number, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role in ANSWERING or not isinstance(content, str) or content.strip() in text:
            continue
        other = [*messages[:number], {**message, "content": f"{content} {content}"}, *messages[number + 1 :]]
        if render(other) != text:
            continue
        advice = "set model.chat_template to one that writes it, or use another model"
        if role not in KNOWN:
            known = "system" if role == "developer" else "user"
            names = f"{{role: role, content: content, {role}: {known}}}"
            advice = f"map the role in task.messages_from, such as {names}, or set model.chat_template"
        return f"leaves out the message of the role {role!r}; {advice}"
    return None
