"""docs/troubleshooting.md quotes messages: every one that it quotes is written by the code, word for word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"  # stands for what an f-string fills in
HEADER = "| the message has |"


def quoted_messages() -> list[str]:
    """The texts in backticks that begin the rows of the tables of messages."""
    messages, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        inside = line.startswith(HEADER) or (inside and line.startswith("|"))
        if inside:
            messages += re.findall(r"`([^`]+)`", line.split("|")[1])
    return messages


def text_of(node: ast.AST) -> str:
    """A string as it is written, with gaps for what is filled in; joined strings in one piece."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(text_of(value) for value in node.values)
        case ast.BinOp(op=ast.Add()):
            return text_of(node.left) + text_of(node.right)
        case _:
            return GAP


def documentation(tree: ast.AST) -> set[int]:
    """The ids of the nodes that are docstrings, which nobody is shown."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


def written_messages() -> list[str]:
    """All strings of the code of `pipeline/`."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    texts = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        left_out = documentation(tree)
        texts |= {text_of(node) for node in ast.walk(tree) if isinstance(node, kinds) and id(node) not in left_out}
    return sorted(texts - {GAP, ""})


WRITTEN = written_messages()


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_one_of_the_code(message):
    pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in message.split("...")), re.S)
    assert any(pattern.search(text) for text in WRITTEN), f"no message of pipeline/ has: {message}"


def test_the_page_quotes_messages_once_each():
    messages = quoted_messages()
    assert len(messages) > 60 and len(set(messages)) == len(messages)
    assert all(len(message) > 8 for message in messages)  # shorter ones would be found anywhere
