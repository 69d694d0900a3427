"""Read json, jsonl, csv and tsv files row by row, and name the line and column of what is broken."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.tasks.encoding import check_text, decode_text
from pipeline.tasks.types import TaskError

MAX_CSV_FIELD = 2**31 - 1  # the csv module stops at 131,072 characters, less than a long document
DELIMITERS = {".csv": ",", ".tsv": "\t"}
QUOTED_FIELD = re.compile(r'"([^"]|"")*"')
SEVERAL_LINES = re.compile(r"[\r\n]")
_A_LIST = "expected a list of objects, one for each example"
Row = dict[str, Any]


class _BrokenRowError(ValueError):
    """One row that cannot be parsed: where, and why."""


def read_text_rows(path: Path, broken: list[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yield each row with its number: a line (from 1), or in a JSON list the index (from 0).

    Rows that cannot be parsed are left out and described in `broken`; without such a list they are errors.

    Raises:
        TaskError: with the place as `file:line:column`.
    """
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        check_text(path, "task.path")
        return _read_csv(path, broken, DELIMITERS[suffix])
    text = decode_text(path, "task.path")
    return _read_json_lines(path, text, broken) if has_lines(path) else _read_json_list(path, text, broken)


def first_line(path: Path) -> str:
    """Return the first line of a text file that is not blank, without the white space around it."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return next((line.strip() for line in file if line.strip()), "")


def has_lines(path: Path) -> bool:
    """Return whether each row of a text file has a line number; a JSON list has none."""
    if path.suffix.lower() != ".json":
        return True
    line = first_line(path)
    try:
        return line.startswith("{") and isinstance(_parse_json(path, line), dict)
    except _BrokenRowError:
        return False  # one object over several lines, or broken: _read_json_list says where


def _leave_out(error: _BrokenRowError, broken: list[str] | None) -> None:
    """Note a broken row in `broken`.

    Raises:
        TaskError: there is no such list, so broken rows are errors.
    """
    if broken is None:
        raise TaskError(f"task.path: {error}") from error
    broken.append(str(error))


def _read_json_lines(path: Path, text: str, broken: list[str] | None) -> Iterator[tuple[int, Row]]:
    # Not splitlines(): it also breaks at U+2028 and similar characters, which JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse_json(path, line, first_line=number)
            if not isinstance(row, dict):
                raise _BrokenRowError(f"{path}:{number}: expected an object {{...}}, found {_json_kind(row)}")
            _check_characters(row, f"{path}:{number}")
        except _BrokenRowError as error:
            _leave_out(error, broken)
            continue
        yield number, row


def _read_json_list(path: Path, text: str, broken: list[str] | None) -> Iterator[tuple[int, Row]]:
    try:
        rows = _parse_json(path, text)
    except _BrokenRowError as error:
        raise TaskError(f"task.path: {error}") from error
    if not isinstance(rows, list):
        raise TaskError(f"task.path: {str(path)!r}: {_A_LIST}, found {_json_kind(rows)}")
    for index, row in enumerate(rows):
        item = f"(item {index}, the first is 0)"
        try:
            if not isinstance(row, dict):
                raise _BrokenRowError(f"{str(path)!r}: {_A_LIST}, found a list with {_json_kind(row)} {item}")
            _check_characters(row, f"{str(path)!r} {item}")
        except _BrokenRowError as error:
            _leave_out(error, broken)
            continue
        yield index, row


def _check_characters(row: Row, place: str) -> None:
    """Refuse half of a character, which JSON can escape and no file can hold.

    Raises:
        _BrokenRowError: at `place`.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _BrokenRowError(f"{place}: half of a character (a lone surrogate such as \\ud83d)") from error


def _parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    """Parse JSON.

    Raises:
        _BrokenRowError: it is not valid.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, column = first_line + error.lineno - 1, error.colno
        snippet = text[max(0, error.pos - 30) : error.pos + 30].strip()
        raise _BrokenRowError(f"{path}:{line}:{column}: not valid JSON ({error.msg}) near {snippet!r}") from error
    except RecursionError as error:
        raise _BrokenRowError(f"{path}:{first_line}: lists or objects are nested too deeply to be read") from error
    except ValueError as error:  # a number of thousands of digits
        raise _BrokenRowError(f"{path}:{first_line}: not valid JSON ({error})") from error


def _json_kind(value: object) -> str:
    kinds = {dict: "one object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_csv(path: Path, broken: list[str] | None, delimiter: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_CSV_FIELD)  # of the process: the module has no other way
    header, start = [], 1
    quoting = csv.QUOTE_NONE if delimiter == "\t" and _is_unquoted(path) else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True, quoting=quoting)
        try:
            for fields in reader:
                if not header:
                    header = _checked_header(path, fields, delimiter)
                elif delimiter == "\t" and any("\t" in field and SEVERAL_LINES.search(field) for field in fields):
                    raise TaskError(
                        f"task.path: {path}:{start}: a field that starts with a quote runs over tabs and lines up to "
                        f"line {reader.line_num}; double the quotes inside fields and put each field into quotes, or "
                        "write the rows into a .jsonl file"
                    )
                elif fields and len(fields) != len(header):
                    problem = f"found {len(fields)} fields, and the first line names {len(header)} columns"
                    _leave_out(_BrokenRowError(f"{path}:{start}: {problem} ({', '.join(header)})"), broken)
                elif fields:
                    yield start, dict(zip(header, fields, strict=True))
                start = reader.line_num + 1  # a quoted field may run over several lines
        except csv.Error as error:  # nobody knows where the next row begins
            raise TaskError(
                f"task.path: {path}:{start}: not a valid row ({error}); a field that starts with a quote ends with "
                "one, and quotes inside it are doubled"
            ) from error


def _is_unquoted(path: Path) -> bool:
    """Return whether quotes in a file of tabs are letters like others: each line is a row, and no field is quoted."""
    tabs = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in (line.rstrip("\r\n") for line in file):
            tabs = line.count("\t") if tabs is None else tabs
            if line and (line.count("\t") != tabs or any(map(QUOTED_FIELD.fullmatch, line.split("\t")))):
                return False
    return True


def _checked_header(path: Path, names: list[str], delimiter: str) -> list[str]:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise TaskError(f"task.path: {path}:1: the first line names the column {twice[0]!r} twice; rename one")
    if len(names) == 1 and delimiter == "," and (other := next((sign for sign in ";\t" if sign in names[0]), None)):
        raise TaskError(
            f"task.path: {path}:1: the file seems to be separated by {other!r}, found the one column {names[0]!r}; "
            "save it with commas, or with tabs as .tsv"
        )
    return names
