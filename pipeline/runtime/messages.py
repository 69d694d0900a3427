"""What is printed of foreign texts: one line, without tokens, keys and passwords."""

import difflib
import os
import re
import sys
from collections.abc import Iterable

from accelerate import PartialState

HIDDEN = "***"
# Names of environment variables and keys that hold a secret: by their ends, as in HF_TOKEN, not as in HF_TOKEN_PATH.
SECRET_NAMES = re.compile(
    r"(?i)(^|[_.-])(api_?keys?|access_?keys?(_?id)?|account_?keys?|private_?keys?|secret_?keys?|auth_?keys?|secrets?"
    r"|passwords?|passwd|passphrases?|credentials?|(access|auth|bearer|hub|hf|api|secret|session|refresh)_?tokens?)$"
)
BARE_TOKEN = re.compile(r"(?i)(^|[_.-])tokens?$")  # also a word of a text, so only where its value looks random
# What well-known services give out, and what carries a password anywhere.
SECRET_VALUES = re.compile(
    r"\b(hf|api_org)_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
URL_PASSWORD = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)([^\s/:@'\"]*:[^\s/@'\"]+)(?=@)")
URL_TOKEN = re.compile(
    r"(?i)([?&](?:access_?token|token|api_?key|key|sig|signature|password|secret|x-amz-signature)=)([^&\s'\"]{8,})"
)
MIN_LENGTH = 8  # shorter values of the environment are words like `false`


def environment_secrets() -> list[str]:
    """The values of environment variables that are named like a secret, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and (SECRET_NAMES.search(name) or BARE_TOKEN.search(name))
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """`text` without the secrets of the environment, known kinds of tokens, and passwords in URLs."""
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    text = URL_PASSWORD.sub(rf"\1{HIDDEN}", SECRET_VALUES.sub(HIDDEN, text))
    return URL_TOKEN.sub(rf"\1{HIDDEN}", text)


def one_line(message: object) -> str:
    """What is printed of an error: one line without secrets, and without what would steer the terminal."""
    text = redact(" ".join(str(message).split()))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean 'x'?` for the known word most like `word`, or nothing; upper case counts as lower."""
    lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower_case, n=1, cutoff=cutoff)
    return f"; did you mean {lower_case[close[0]]!r}?" if close else ""


def say(*lines: str) -> None:
    """Print lines on stderr, on the main process alone."""
    if lines and PartialState().is_main_process:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
