"""Rows of json, jsonl, csv, tsv and parquet files, of directories saved by `save_to_disk`, and of Hub data sets."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from pipeline.tasks.types import TaskError

PROBE_SECONDS = 4.0
MAX_CSV_FIELD = 2**31 - 1  # the csv module stops at 131,072 characters, less than a long document


@dataclass(frozen=True)
class Table:
    """Rows and what messages call them: `numbers` are lines of a text file (from 1), else rows (from 0)."""

    place: str
    rows: list[dict[str, Any]] | Dataset
    columns: list[str]
    numbers: Sequence[int]
    unit: str = "row"

    def part(self, start: int, stop: int) -> "Table":
        """The rows from `start` up to `stop`, as dictionaries in memory."""
        if isinstance(self.rows, Dataset):
            rows = self.rows.select(range(start, stop)).to_list()
        else:
            rows = self.rows[start:stop]
        return replace(self, rows=rows, numbers=self.numbers[start:stop])

    def where(self, indices: Sequence[int]) -> str:
        """`line 3 of 'a.csv'`, or the first three of several rows: `lines 3, 5, 8 and 40 more of 'a.csv'`."""
        first = ", ".join(str(self.numbers[index]) for index in indices[:3])
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        unit = self.unit if len(indices) == 1 else f"{self.unit}s"
        return f"{unit} {first}{more} of {self.place}{'' if self.unit == 'line' else ' (the first is row 0)'}"


def read_file(path: Path) -> Table:
    """The rows of a file in the format its suffix names.

    Text files are UTF-8, with or without a byte-order mark; CSV values are texts, JSON values keep their types.

    Raises:
        TaskError: the file is empty or cannot be read; for a text the message has the place as `file:line:column`.
    """
    if path.stat().st_size == 0:
        raise TaskError(f"task.path: the file {str(path)!r} is empty")
    table = READERS[path.suffix.lower()](path)
    if not table.rows:
        raise TaskError(f"task.path: the file {str(path)!r} has no rows")
    return table


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(
            f"task.path: {path}:{line}: not UTF-8 (byte {error.start}); convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from error


def _read_json_lines(path: Path, text: str | None = None) -> Table:
    rows, numbers = [], []
    # Not splitlines(): it also breaks at U+2028 and its kin, which JSON allows inside a text.
    for number, line in enumerate((_read_text(path) if text is None else text).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(path, line, first_line=number)
        if not isinstance(row, dict):
            raise TaskError(f"task.path: {path}:{number}: expected an object {{...}}, found {_json_kind(row)}")
        rows.append(row)
        numbers.append(number)
    return Table(repr(str(path)), rows, _columns(rows), numbers, "line")


def _read_json(path: Path) -> Table:
    """One list of objects, or JSON lines under the suffix .json."""
    text = _read_text(path)
    first_line = text.strip().split("\n", 1)[0]
    try:
        if isinstance(json.loads(first_line), dict):
            return _read_json_lines(path, text)
    except json.JSONDecodeError:
        pass  # a list over several lines, or broken: the next lines say where
    rows = _parse_json(path, text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        odd = next((f"a list with {_json_kind(row)}" for row in rows if not isinstance(row, dict)), "")
        raise TaskError(
            f"task.path: {str(path)!r}: expected a list of objects, one for each example, "
            f"found {odd if isinstance(rows, list) else _json_kind(rows)}"
        )
    return Table(repr(str(path)), rows, _columns(rows), range(len(rows)))


def _parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, column = first_line + error.lineno - 1, error.colno
        snippet = text[max(0, error.pos - 30) : error.pos + 30].strip()
        raise TaskError(f"task.path: {path}:{line}:{column}: not valid JSON ({error.msg}) near {snippet!r}") from error


def _json_kind(value: object) -> str:
    kinds = {dict: "one object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_csv(path: Path, delimiter: str) -> Table:
    text = _read_text(path)
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, numbers, header, start = [], [], [], 1
    try:
        for fields in reader:
            if not header:
                header = _checked_header(path, fields)
            elif fields and len(fields) != len(header):
                raise TaskError(
                    f"task.path: {path}:{start}: found {len(fields)} fields, and the first line names "
                    f"{len(header)} columns ({', '.join(header)})"
                )
            elif fields:
                rows.append(dict(zip(header, fields, strict=True)))
                numbers.append(start)
            start = reader.line_num + 1  # a quoted field may run over several lines
    except csv.Error as error:
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


def _read_parquet(path: Path) -> Table:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"task.path: {str(path)!r} cannot be read as parquet ({_one_line(error)})") from error
    return Table(repr(str(path)), rows, _columns(rows), range(len(rows)))


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


READERS: dict[str, Callable[[Path], Table]] = {
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
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
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
