"""Rows of json, jsonl, csv, tsv and parquet files, of directories saved by `save_to_disk`, and of Hub data sets."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from pipeline.tasks.encoding import decode_text
from pipeline.tasks.types import TaskError

PROBE_SECONDS = 4.0
_A_LIST = "expected a list of objects, one for each example"
MAX_CSV_FIELD = 2**31 - 1  # the csv module stops at 131,072 characters, less than a long document


@dataclass(frozen=True)
class Table:
    """Rows and what messages call them: `numbers` are lines of a text file (from 1), else rows (from 0).

    `broken` says of each row that was left out where it was and why.
    """

    place: str
    rows: list[dict[str, Any]] | Dataset
    columns: list[str]
    numbers: Sequence[int]
    unit: str = "row"
    broken: tuple[str, ...] = ()

    def part(self, start: int, stop: int) -> "Table":
        """The rows from `start` up to `stop`, as dictionaries in memory."""
        if isinstance(self.rows, Dataset):
            rows = self.rows.select(range(start, stop)).to_list()
        else:
            rows = self.rows[start:stop]
        return replace(self, rows=rows, numbers=self.numbers[start:stop], broken=())

    def without(self, reasons: Mapping[int, str]) -> "Table":
        """The table without the rows at these indices, which are broken for these reasons."""
        kept = [index for index in range(len(self.rows)) if index not in reasons]
        return replace(
            self,
            rows=[self.rows[index] for index in kept],
            numbers=[self.numbers[index] for index in kept],
            broken=(*self.broken, *(f"{self.where([index])}: {reason}" for index, reason in reasons.items())),
        )

    def where(self, indices: Sequence[int]) -> str:
        """`line 3 of 'a.csv'`, or the first three of several rows: `lines 3, 5, 8 and 40 more of 'a.csv'`."""
        first = ", ".join(str(self.numbers[index]) for index in indices[:3])
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        unit = self.unit if len(indices) == 1 else f"{self.unit}s"
        return f"{unit} {first}{more} of {self.place}{'' if self.unit == 'line' else ' (the first is row 0)'}"


def read_file(path: Path, skip_broken: bool = False) -> Table:
    """The rows of a file in the format its suffix names.

    Text files are UTF-8, with or without a byte-order mark; CSV values are texts, JSON values keep their types. With
    `skip_broken`, rows that cannot be parsed are left out and listed in the table.

    Raises:
        TaskError: the file is empty or cannot be read; for a text the message has the place as `file:line:column`.
    """
    if path.stat().st_size == 0:
        raise TaskError(f"task.path: the file {str(path)!r} is empty")
    broken: list[str] | None = [] if skip_broken else None
    table = READERS[path.suffix.lower()](path, broken)
    if not table.rows:
        why = f" that is not broken: {broken[0]}" if broken else "s"
        raise TaskError(f"task.path: the file {str(path)!r} has no row{why}")
    return replace(table, broken=tuple(broken or ()))


class _BrokenRowError(ValueError):
    """One row that cannot be parsed: where, and why."""


def _leave_out(error: _BrokenRowError, broken: list[str] | None) -> None:
    """Note a broken row in `broken`.

    Raises:
        TaskError: there is no such list, so broken rows are errors.
    """
    if broken is None:
        raise TaskError(f"task.path: {error}") from error
    broken.append(str(error))


def _read_text(path: Path) -> str:
    return decode_text(path, "task.path")


def _read_json_lines(path: Path, broken: list[str] | None, text: str | None = None) -> Table:
    rows, numbers = [], []
    # Not splitlines(): it also breaks at U+2028 and its kin, which JSON allows inside a text.
    for number, line in enumerate((_read_text(path) if text is None else text).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse_json(path, line, first_line=number)
            if not isinstance(row, dict):
                raise _BrokenRowError(f"{path}:{number}: expected an object {{...}}, found {_json_kind(row)}")
        except _BrokenRowError as error:
            _leave_out(error, broken)
            continue
        rows.append(row)
        numbers.append(number)
    return Table(repr(str(path)), rows, _columns(rows), numbers, "line")


def _read_json(path: Path, broken: list[str] | None) -> Table:
    """One list of objects, or JSON lines under the suffix .json."""
    text = _read_text(path)
    try:
        if isinstance(_parse_json(path, text.strip().split("\n", 1)[0]), dict):
            return _read_json_lines(path, broken, text)
    except _BrokenRowError:
        pass  # a list over several lines, or broken: the next lines say where
    try:
        rows = _parse_json(path, text)
    except _BrokenRowError as error:
        raise TaskError(f"task.path: {error}") from error
    if not isinstance(rows, list):
        raise TaskError(f"task.path: {str(path)!r}: {_A_LIST}, found {_json_kind(rows)}")
    good = [index for index, row in enumerate(rows) if isinstance(row, dict)]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            place = f"{str(path)!r}: {_A_LIST}, found a list with {_json_kind(row)} (item {index}, the first is 0)"
            _leave_out(_BrokenRowError(place), broken)
    rows = [rows[index] for index in good]
    return Table(repr(str(path)), rows, _columns(rows), good)


def _parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    """
    Raises:
        _BrokenRowError: it is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, column = first_line + error.lineno - 1, error.colno
        snippet = text[max(0, error.pos - 30) : error.pos + 30].strip()
        raise _BrokenRowError(f"{path}:{line}:{column}: not valid JSON ({error.msg}) near {snippet!r}") from error
    except RecursionError as error:
        raise _BrokenRowError(f"{path}:{first_line}: lists or objects in one another too deep to be read") from error
    except ValueError as error:  # a number of thousands of digits
        raise _BrokenRowError(f"{path}:{first_line}: not valid JSON ({error})") from error


def _json_kind(value: object) -> str:
    kinds = {dict: "one object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_csv(path: Path, broken: list[str] | None, delimiter: str) -> Table:
    text = _read_text(path)
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, numbers, header, start = [], [], [], 1
    try:
        for fields in reader:
            if not header:
                header = _checked_header(path, fields)
            elif fields and len(fields) != len(header):
                _leave_out(
                    _BrokenRowError(
                        f"{path}:{start}: found {len(fields)} fields, and the first line names "
                        f"{len(header)} columns ({', '.join(header)})"
                    ),
                    broken,
                )
            elif fields:
                rows.append(dict(zip(header, fields, strict=True)))
                numbers.append(start)
            start = reader.line_num + 1  # a quoted field may run over several lines
    except csv.Error as error:  # of what follows, nobody knows where a row begins
        raise TaskError(
            f"task.path: {path}:{start}: not a valid row ({error}); a field that starts with a quote ends with one, "
            "and quotes inside it are doubled"
        ) from error
    return Table(repr(str(path)), rows, header, numbers, "line")


def _checked_header(path: Path, names: list[str]) -> list[str]:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise TaskError(f"task.path: {path}:1: the first line names the column {twice[0]!r} twice; rename one")
    return names


def _read_parquet(path: Path, broken: list[str] | None) -> Table:
    """A parquet file is whole or not at all: no row of it is broken by itself."""
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # whatever a damaged file gives rise to
        raise TaskError(f"task.path: {str(path)!r} cannot be read as parquet ({_one_line(error)})") from error
    return Table(repr(str(path)), rows, _columns(rows), range(len(rows)))


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


READERS: dict[str, Callable[[Path, list[str] | None], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}


def read_saved(directory: Path) -> dict[str, Table]:
    """The splits of a directory written by `save_to_disk`; one without splits is called train.

    Raises:
        TaskError: the directory holds something else.
    """
    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:  # as above
        raise TaskError(f"task.path: {str(directory)!r} cannot be loaded ({_one_line(error)})") from error
    return _tables(saved if isinstance(saved, DatasetDict) else {"train": saved}, str(directory))


def check_hub(name: str, subset: str | None, revision: str | None) -> None:
    """Refuse a data set that can neither be asked for on the Hub nor found in the cache, in seconds.

    Raises:
        TaskError: as `hub_reachable`, or the Hub does not answer and there is no cached copy.
    """
    if not hub_reachable(name, revision):
        _from_hub(datasets.load_dataset_builder, name, subset, revision)


def read_hub(name: str, subset: str | None, revision: str | None) -> dict[str, Table]:
    """The splits of a data set on the Hub, or of its cached copy where the Hub cannot be reached; no code of it runs.

    Raises:
        TaskError: it cannot be had, the subset is unknown, or the cached copy is not the `revision` asked for.
    """
    found = _from_hub(datasets.load_dataset, name, subset, revision)
    if revision is not None and not hub_reachable(name, revision):
        _check_cached_revision(name, revision, found)
    return _tables(found, name)


def _from_hub(load: Callable[..., Any], name: str, subset: str | None, revision: str | None) -> Any:
    reachable, before = hub_reachable(name, revision), datasets.config.HF_HUB_OFFLINE
    # Left to itself the library retries each request for half a minute before it looks into its cache.
    datasets.config.HF_HUB_OFFLINE = before or not reachable
    try:
        return load(name, subset, revision=revision)
    except Exception as error:  # whatever the many kinds of data files give rise to
        key = "subset" if "BuilderConfig" in str(error) or "Config name" in str(error) else "path"
        problem = f"cannot be loaded from the Hugging Face Hub ({_one_line(error)})"
        if not reachable:
            problem = "is not here, the Hugging Face Hub does not answer, and no copy of it is cached"
        raise TaskError(
            f"task.{key}: {name!r} {problem}; give a local file such as data/{{split}}.jsonl, "
            "or go online to download it once"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _check_cached_revision(name: str, revision: str, found: DatasetDict) -> None:
    """Offline the library takes any copy it has."""
    urls = [url for split in found.values() for url in split.info.download_checksums or {}]
    if not urls or not all(f"@{revision}" in url for url in urls):
        raise TaskError(
            f"task.revision: the cached copy of {name!r} is not known to be {revision!r}, and the Hugging Face Hub "
            "does not answer; go online, or remove the key to use the copy as it is"
        )


@lru_cache
def hub_reachable(name: str, revision: str | None) -> bool:
    """Whether the Hub answers, within PROBE_SECONDS; False also where the environment forbids to ask.

    Raises:
        TaskError: it answers that there is no such data set or revision, or that it needs a login.
    """
    if datasets.config.HF_HUB_OFFLINE:
        return False
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, revision=revision, timeout=PROBE_SECONDS)
            answers.append(None)
        except Exception as error:
            answers.append(error)

    # In a thread, because the time limit of a request does not cover the look-up of the host's name.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    answer = answers[0] if answers else TimeoutError()
    refused = isinstance(answer, HfHubHTTPError) and answer.response.status_code in (400, 401, 403, 404)
    if refused or isinstance(answer, ValueError):  # a ValueError: not even the form of a name
        raise TaskError(
            f"task.path: {name!r} is neither a file or directory here nor a data set on the Hugging Face Hub that can "
            f"be read ({_one_line(answer)}); for local data give a file such as data/{{split}}.jsonl"
        ) from answer
    return answer is None


def _tables(splits: dict[str, Dataset], name: str) -> dict[str, Table]:
    return {
        split: Table(f"split {split!r} of {name!r}", rows, list(rows.column_names), range(len(rows)))
        for split, rows in splits.items()
    }


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".")
