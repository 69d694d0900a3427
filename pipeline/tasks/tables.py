"""Read files, directories written by `save_to_disk` and data sets of the Hub with the library `datasets`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from pyarrow import compute

from pipeline.runtime.files import sha256
from pipeline.runtime.hub import HubAnswer, ask_hub
from pipeline.tasks import text_rows
from pipeline.tasks.encoding import check_text
from pipeline.tasks.text_rows import DELIMITERS, Row, first_line, has_lines, read_text_rows
from pipeline.tasks.types import TaskError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
SOURCE = sha256(Path(text_rows.__file__))
WRITTEN_DATE = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$"  # as pyarrow writes one


@dataclass(frozen=True)
class SourceTable:
    """A data set, and what messages call its rows.

    `rows` are the numbers of its rows in the data (from 0); `file` is the text file whose lines messages name instead.
    `broken` says of each row that was left out where it was and why.
    """

    place: str
    dataset: Dataset
    rows: Sequence[int]
    file: Path | None = None
    broken: tuple[str, ...] = ()

    def select(self, indices: Sequence[int]) -> "SourceTable":
        """Return the table of these rows alone."""
        return replace(self, dataset=self.dataset.select(indices), rows=[self.rows[i] for i in indices], broken=())

    def without(self, reasons: Mapping[int, str]) -> "SourceTable":
        """Return the table without the rows at these indices, which are broken for these reasons."""
        kept = self.select([index for index in range(len(self.rows)) if index not in reasons])
        places = self.numbers(list(reasons))
        lines = (f"{self._name([place])}: {reason}" for place, reason in zip(places, reasons.values(), strict=True))
        return replace(kept, broken=(*self.broken, *lines))

    def numbers(self, indices: Sequence[int]) -> list[int]:
        """Return the line or row number of each of these rows."""
        if self.file is None:
            return [self.rows[index] for index in indices]
        lines = [number for number, _ in read_text_rows(self.file, broken=[])]
        return [lines[self.rows[index]] for index in indices]

    def where(self, indices: Sequence[int]) -> str:
        """Return `line 3 of 'a.csv'`, or the first three of several rows: `lines 3, 5, 8 and 40 more of 'a.csv'`."""
        return self._name(self.numbers(indices))

    def _name(self, numbers: Sequence[int]) -> str:
        first = ", ".join(map(str, numbers[:3]))
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        unit = ("row" if self.file is None else "line") + "s" * (len(numbers) > 1)
        return f"{unit} {first}{more} of {self.place}{' (the first is row 0)' if self.file is None else ''}"


def read_file(path: Path, skip_broken: bool = False) -> SourceTable:
    """Read a file in the format that its suffix names.

    Text files are UTF-8, with or without a byte-order mark; CSV values are texts, JSON values keep their types. With
    `skip_broken`, rows that cannot be parsed are left out and described in the table.

    Raises:
        TaskError: the file is empty or cannot be read; for a text file the message has the place as
            `file:line:column`.
    """
    if path.stat().st_size == 0:
        raise TaskError(f"task.path: the file {str(path)!r} is empty")
    broken: list[str] = []
    dataset = None if skip_broken and path.suffix.lower() != ".parquet" else _read_with_datasets(path)
    if dataset is None:
        rows = [row for _, row in read_text_rows(path, broken if skip_broken else None)]
        if not rows:
            why = f" that is not broken: {broken[0]}" if broken else "s"
            raise TaskError(f"task.path: the file {str(path)!r} has no row{why}")
        dataset = _in_memory(path, rows)
    lines = path if path.suffix.lower() != ".parquet" and has_lines(path) else None
    return SourceTable(repr(str(path)), dataset, range(len(dataset)), lines, tuple(broken))


def _read_with_datasets(path: Path) -> Dataset | None:
    """Read a file into the cache of `datasets`, from where it is mapped into memory.

    Return None where `datasets` cannot read a text file, or would change what is in it.

    Raises:
        TaskError: a parquet file that cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in DELIMITERS:
            return _read_csv(path)
        if suffix != ".parquet":
            check_text(path, "task.path")  # the JSON reader takes any bytes
        if suffix == ".json" and not (has_lines(path) or first_line(path).startswith("[")):
            return None  # one object
        kind = "parquet" if suffix == ".parquet" else "json"
        # The name is part of the place in the cache, where the library looks at a file's time of change alone.
        dataset = datasets.load_dataset(kind, _state(path), data_files=str(path), split="train")
    except Exception as error:  # `datasets` and pyarrow raise errors of many kinds
        if suffix == ".parquet":
            raise TaskError(f"task.path: {str(path)!r} cannot be read as parquet ({_one_line(error)})") from error
        return None
    if suffix == ".parquet" and not len(dataset):
        raise TaskError(f"task.path: the file {str(path)!r} has no rows")
    return dataset if suffix == ".parquet" or (len(dataset) and not _was_changed(dataset)) else None


def _read_csv(path: Path) -> Dataset:
    """Read a file with Python's csv module: that of `datasets` fills short rows and renames columns without a word."""
    return Dataset.from_generator(_csv_rows, gen_kwargs={"path": path, "state": _state(path) + SOURCE})


def _state(path: Path) -> str:
    """Return what changes with a file, also where a copy keeps the time of its original."""
    state = path.stat()
    return f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}"


def _csv_rows(path: Path, state: str) -> Iterator[Row]:
    """Yield the rows of a file; `state` makes `datasets` read again what changed: the file, or how it is read."""
    for _, row in read_text_rows(path):
        yield row


def _was_changed(dataset: Dataset) -> bool:
    """Return whether the JSON reader may have changed a value.

    It reads a file in pieces, makes dates of texts that look like one, and turns those of a piece into texts of
    another form where other pieces hold other texts. A whole number beyond 2**53 loses digits beside a broken one.
    """
    if any(word in str(dataset.features) for word in ("timestamp", "date32", "date64", "time32", "time64")):
        return True
    for column in dataset.data.itercolumns():
        huge = compute.greater_equal(compute.abs(column), 2.0**53) if pyarrow.types.is_floating(column.type) else []
        texts = [leaf for chunk in column.chunks for leaf in _leaves(chunk) if pyarrow.types.is_string(leaf.type)]
        dates = (compute.match_substring_regex(leaf, WRITTEN_DATE) for leaf in texts)
        if any(compute.any(found).as_py() for found in (huge, *dates) if len(found)):
            return True
    return False


def _leaves(array: pyarrow.Array) -> Iterator[pyarrow.Array]:
    """Yield the arrays of values in an array of lists and mappings."""
    parts = [array.flatten()] if pyarrow.types.is_list(array.type) else []
    parts = array.flatten() if pyarrow.types.is_struct(array.type) else parts
    for part in parts:
        yield from _leaves(part)
    if not parts:
        yield array


def _in_memory(path: Path, rows: list[Row]) -> Dataset:
    """Make a table of rows. A column that no table can hold, as of huge numbers, becomes one of JSON texts."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    unfit = (pyarrow.ArrowException, ValueError, TypeError, OverflowError)
    for name, values in table.items():
        try:
            Dataset.from_list([{name: value} for value in values], on_mixed_types="use_json")
        except unfit:
            table[name] = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    complete = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    try:
        return Dataset.from_list(complete, on_mixed_types="use_json")
    except unfit as error:
        raise TaskError(f"task.path: the rows of {str(path)!r} cannot be stored ({_one_line(error)})") from error


def read_saved(directory: Path) -> dict[str, SourceTable]:
    """Read the splits of a directory written by `save_to_disk`; one without splits is called train.

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
        TaskError: the Hub does not have it, does not answer, or is not to be asked and there is no cached copy.
    """
    if not _ask(name, revision).answered:
        _load(datasets.load_dataset_builder, name, subset, revision)


def read_hub(name: str, subset: str | None, revision: str | None) -> dict[str, SourceTable]:
    """Read the splits of a data set on the Hub, or with HF_HUB_OFFLINE of its cached copy; no code of it runs.

    Raises:
        TaskError: as `check_hub`; the subset is unknown, or the cached copy is not the `revision` asked for.
    """
    answer = _ask(name, revision)
    splits = _load(datasets.load_dataset, name, subset, revision)
    if revision is not None and not answer.answered:
        _check_cached_revision(name, revision, splits)
    return _tables(splits, name)


def _ask(name: str, revision: str | None) -> HubAnswer:
    answer = ask_hub(name, "dataset", revision)
    if answer.problem and not constants.HF_HUB_OFFLINE:
        cached = "" if answer.answered else ", or set HF_HUB_OFFLINE=1 to use a cached copy"
        raise TaskError(
            f"task.path: {name!r} is neither a file or directory here nor a data set that the Hugging Face Hub gives "
            f"({answer.problem}); give a local file such as data/{{split}}.jsonl{cached}"
        )
    return answer


def _load(load: Callable[..., Any], name: str, subset: str | None, revision: str | None) -> Any:
    try:
        return load(name, subset, revision=revision)
    except Exception as error:  # as above
        key = "subset" if "BuilderConfig" in str(error) or "Config name" in str(error) else "path"
        problem = f"cannot be loaded from the Hugging Face Hub ({_one_line(error)})"
        if constants.HF_HUB_OFFLINE:
            problem = f"is not here, HF_HUB_OFFLINE is set, and no copy of it is cached ({_one_line(error)})"
        raise TaskError(
            f"task.{key}: {name!r} {problem}; give a local file such as data/{{split}}.jsonl, "
            "or go online to download it once"
        ) from error


def _check_cached_revision(name: str, revision: str, splits: DatasetDict) -> None:
    """Refuse a cached copy of another revision: offline the library takes any copy that it has."""
    urls = [url for split in splits.values() for url in split.info.download_checksums or {}]
    if not urls or not all(f"@{revision}" in url for url in urls):
        raise TaskError(
            f"task.revision: the cached copy of {name!r} is not known to be {revision!r}, and HF_HUB_OFFLINE is set; "
            "go online, or remove the key to use the copy as it is"
        )


def _tables(splits: Mapping[str, Dataset], name: str) -> dict[str, SourceTable]:
    return {
        split: SourceTable(f"split {split!r} of {name!r}", dataset, range(len(dataset)))
        for split, dataset in splits.items()
    }


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".")
