"""Decode text files: UTF-8, with or without a byte-order mark; errors name the line and the byte."""

from pathlib import Path

from pipeline.tasks.types import TaskError

UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def decode_text(path: Path, key: str) -> str:
    """Return the text of a UTF-8 file, without its byte-order mark; messages begin with `key`.

    Raises:
        TaskError: another encoding, or a NUL, with the line, the byte (from 0) and how to convert it.
    """
    data = path.read_bytes()
    nul = data.find(b"\0")
    if data.startswith(UTF_16_MARKS):
        raise _error(path, key, data, 0, "UTF-16, not UTF-8", "convert it, for example with iconv -f utf-16 -t utf-8")
    if nul >= 0:
        advice = "no text has one: the file is damaged, or not UTF-8; convert it, or remove them with tr -d '\\000'"
        raise _error(path, key, data, nul, "a NUL", advice)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from the end of a byte-order mark.
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        advice = "convert it, for example with iconv -f latin1 -t utf-8"
        raise _error(path, key, data, start, "not UTF-8", advice) from error


def check_text(path: Path, key: str) -> None:
    """Refuse a file that `decode_text` would refuse, without holding it in memory.

    Raises:
        TaskError: as `decode_text`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if not any("\0" in line for line in file):
                return
    except UnicodeError:
        pass
    decode_text(path, key)


def _error(path: Path, key: str, data: bytes, start: int, what: str, advice: str) -> TaskError:
    line = data.count(b"\n", 0, start) + 1
    return TaskError(f"{key}: {path}:{line}: {what} (byte {start}); {advice}")
