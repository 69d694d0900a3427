"""Texts for people: errors on one line without secrets, and the name that was meant."""

import difflib
import os
import re
import sys
from collections.abc import Iterable

from accelerate import PartialState

HIDDEN = "***"
# Names of environment variables that hold a secret: by their ends, as in HF_TOKEN, not as in HF_TOKEN_PATH.
SECRET_NAMES = re.compile(
    r"(?i)(^|[_.-])(api_?keys?|keys?|key_id|tokens?|secrets?|credentials?|passphrase)$|(password|passwd)s?$"
)
URL_PASSWORD = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)([^\s/:@'\"]*:[^\s/@'\"]+)(?=@)")
MIN_LENGTH = 8  # shorter values of the environment are words like `false`


def environment_secrets() -> list[str]:
    """Return the values of environment variables that are named like a secret, the longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= MIN_LENGTH and SECRET_NAMES.search(name)}
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """Hide the secrets of the environment, and passwords in URLs."""
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    return URL_PASSWORD.sub(rf"\1{HIDDEN}", text)


def printable(text: str) -> str:
    """Escape what would steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(message: object) -> str:
    """Write an error on one printable line without secrets."""
    return printable(redact(" ".join(str(message).split())))


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean 'x'?` for the known word most like `word`, or nothing; upper case counts as lower."""
    lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower_case, n=1, cutoff=cutoff)
    return f"; did you mean {lower_case[close[0]]!r}?" if close else ""


def yaml_text(value: object, quotes: bool = True) -> str:
    """Write a value as a recipe would: null, true, a list in brackets, a text in quotes if they are wanted."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    return value if isinstance(value, str) and not quotes else repr(value)


def say(*lines: str) -> None:
    """Print lines on stderr, on the main process alone."""
    if lines and PartialState().is_main_process:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
