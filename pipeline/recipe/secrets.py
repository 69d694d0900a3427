"""Tokens, keys and passwords are refused in a recipe, which is saved with its run."""

import re
from collections.abc import Iterator
from typing import Any

from pipeline.runtime.messages import (
    BARE_TOKEN,
    SECRET_NAMES,
    SECRET_VALUES,
    URL_PASSWORD,
    URL_TOKEN,
    environment_secrets,
)

_RANDOM = re.compile(r"(?=.*[0-9])[A-Za-z0-9_.+/=-]{16,}")
MIN_NAMED = 4


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
    if URL_PASSWORD.search(value) or URL_TOKEN.search(value):
        return "it is a URL with a password or token in it"
    if SECRET_VALUES.search(value):
        return "it looks like an access token or key"
    named = SECRET_NAMES.search(key) is not None or (BARE_TOKEN.search(key) and _RANDOM.fullmatch(value))
    return "its name says that it is a secret" if named and _could_be_one(value) else None


def _could_be_one(value: str) -> bool:
    """Not too short, and not the name of an environment variable, such as $HF_TOKEN."""
    return len(value) >= MIN_NAMED and re.fullmatch(r"\$\w+|\$\{\w+\}", value) is None
