"""Tokens, keys and passwords: refused in a recipe, which is saved with its run, and struck out of what is printed."""

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
# Names of environment variables and keys that hold a secret: by their ends, as in HF_TOKEN, not as in HF_TOKEN_PATH.
_NAMES = re.compile(
    r"(?i)(^|[_.-])(api_?keys?|access_?keys?(_?id)?|account_?keys?|private_?keys?|secret_?keys?|auth_?keys?|secrets?"
    r"|passwords?|passwd|passphrases?|credentials?|(access|auth|bearer|hub|hf|api|secret|session|refresh)_?tokens?)$"
)
_BARE_TOKEN = re.compile(r"(?i)(^|[_.-])tokens?$")  # also a word of a text, so only where its value looks random
_RANDOM = re.compile(r"(?=.*[0-9])[A-Za-z0-9_.+/=-]{16,}")
# What well-known services give out, and what carries a password anywhere.
_VALUES = re.compile(
    r"\b(hf|api_org)_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_URL_PASSWORD = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)([^\s/:@'\"]*:[^\s/@'\"]+)(?=@)")
_URL_TOKEN = re.compile(
    r"(?i)([?&](?:access_?token|token|api_?key|key|sig|signature|password|secret|x-amz-signature)=)([^&\s'\"]{8,})"
)
MIN_LENGTH = 8  # shorter values of the environment are words like `false`
MIN_NAMED = 4


def environment_secrets() -> list[str]:
    """The values of environment variables that are named like a secret, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and (_NAMES.search(name) or _BARE_TOKEN.search(name))
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """`text` without the secrets of the environment, known kinds of tokens, and passwords in URLs."""
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    text = _URL_PASSWORD.sub(rf"\1{HIDDEN}", _VALUES.sub(HIDDEN, text))
    return _URL_TOKEN.sub(rf"\1{HIDDEN}", text)


def secret_in(values: Any) -> tuple[tuple[str | int, ...], str] | None:
    """The path of the first secret in plain nested values and what gave it away, or None."""
    known = environment_secrets()
    for path, value in _texts(values):
        if (reason := _reason(str(path[-1]) if path else "", value, known)) is not None:
            return path, reason
    return None


def _texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                yield (*path, ""), key  # nobody should, but a key can be one too
            yield from _texts(item, (*path, key))
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield path, str(value)


def _reason(key: str, value: str, known: list[str]) -> str | None:
    if any(secret in value for secret in known):
        return "it holds a secret of the environment"
    if _URL_PASSWORD.search(value) or _URL_TOKEN.search(value):
        return "it is a URL with a password or token in it"
    if _VALUES.search(value):
        return "it looks like an access token or key"
    named = _NAMES.search(key) is not None or (_BARE_TOKEN.search(key) and _RANDOM.fullmatch(value))
    return "its name says that it is a secret" if named and _could_be_one(value) else None


def _could_be_one(value: str) -> bool:
    """Not too short, and not the name of an environment variable, such as $HF_TOKEN."""
    return len(value) >= MIN_NAMED and re.fullmatch(r"\$\w+|\$\{\w+\}", value) is None


def one_line(message: object) -> str:
    """What is printed of an error: one line without secrets, and without what would steer the terminal."""
    text = redact(" ".join(str(message).split()))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
