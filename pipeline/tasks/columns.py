"""Map the columns of any data set: a Hub id, json, jsonl, csv, tsv or parquet files, a `save_to_disk` directory."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from pipeline.tasks.chats import thought_key
from pipeline.tasks.column_config import Config
from pipeline.tasks.column_examples import make_examples, renamed_column
from pipeline.tasks.examples import check_columns
from pipeline.tasks.parts import check_disjoint, select_part, split_name
from pipeline.tasks.tables import SUFFIXES, SourceTable, check_hub, read_file, read_hub, read_saved
from pipeline.tasks.types import SPLITS, Task, TaskError, Where, hold_out

__all__ = ["Config", "check_reachable", "files", "load", "read_tables", "thoughts_warning"]
LOOKED_AT = 100  # rows, for thoughts that are left out
SAVED_MARKERS = ("dataset_dict.json", "dataset_info.json")


def files(config: Config) -> list[Path]:
    """Return every local file the task reads: a changed file makes a finished stage out of date. None for the Hub.

    Nothing goes to the network.

    Raises:
        TaskError: one does not exist or has no format known here; an option that does nothing for this path.
    """
    if not config.is_local:
        return []
    for key in ("subset", "revision"):
        if getattr(config, key) is not None:
            raise TaskError(f"task.{key}: it would do nothing: {config.path!r} is local, and only Hub data has it")
    paths: dict[Path, None] = {}
    for split in SPLITS:
        path = config.local_path(split_name(getattr(config, split)))
        if path.is_dir():
            _check_saved(path)
            inside = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("cache-"))
            paths |= dict.fromkeys(inside)
        else:
            _check_file(config, split, path)
            paths[path] = None
    return list(paths)


def check_reachable(config: Config) -> None:
    """Refuse a Hub data set that can neither be asked for on the Hub nor found in the cache, in seconds.

    Raises:
        TaskError: as `check_hub`.
    """
    if not config.is_local:
        check_hub(config.path, config.subset, config.revision)


def _check_saved(directory: Path) -> None:
    if not any((directory / name).is_file() for name in SAVED_MARKERS):
        suffixes = sorted({p.suffix for p in directory.iterdir() if p.suffix.lower() in SUFFIXES})
        example = directory / f"{{split}}{suffixes[0] if suffixes else '.jsonl'}"
        raise TaskError(
            f"task.path: the directory {str(directory)!r} was not written by save_to_disk; "
            f"give a file, such as {str(example)!r}"
        )


def _check_file(config: Config, split: str, path: Path) -> None:
    if not path.is_file():
        suffix = path.suffix
        near = sorted(p.name for p in path.parent.glob(f"*{suffix}")) if suffix and path.parent.is_dir() else []
        there = f"; there are: {', '.join(near[:5])}{', ...' if len(near) > 5 else ''}" if near else ""
        named = near and "{split}" in config.path
        advice = f"name the split in task.{split}" if named else "set task.data_dir to the folder that holds the data"
        raise TaskError(f"task.path: no file {str(path)!r} for the {split} split{there}; {advice}")
    if path.suffix.lower() not in SUFFIXES:
        raise TaskError(f"task.path: {str(path)!r} is in no known format; its name must end in {', '.join(SUFFIXES)}")
    if "{split}" not in config.path and split_name(getattr(config, split)) != "train":
        raise TaskError(
            f"task.{split}: {config.path!r} is one file, all of it train, found {getattr(config, split)!r}; "
            "name a part of it, such as train[80%:90%], or put {split} into task.path"
        )


def load(config: Config) -> Task:
    """Read the data and make its three splits, which share no row.

    Raises:
        TaskError: as `files` and `check_reachable`; a column that is not there; rows that give no example.
    """
    files(config)
    check_reachable(config)
    tables = read_tables(config)
    if config.cluster is not None:
        check_columns(tables["test"], "cluster", config.cluster)
    check_disjoint({split: (getattr(config, split), len(tables[split].rows)) for split in SPLITS})
    splits, places, broken = {}, {}, [line for table in tables.values() for line in table.broken]
    for split in SPLITS:
        part = select_part(tables[split], split, getattr(config, split), getattr(config, f"max_{split}_examples"))
        splits[split], table = make_examples(config, part)
        places[split] = table.where
        broken += table.broken
    cluster = None if config.cluster is None else renamed_column(config.cluster, tables["test"].dataset.column_names)
    if cluster is not None:
        check_clusters(config.cluster, splits["test"][cluster], places["test"])
    task = Task(
        **splits,
        language=config.language,
        left_out=tuple(dict.fromkeys(broken)),  # splits may be parts of one file
        places=places,
        system=config.system,
        strip_thoughts=config.strip_thoughts,
        skip_broken_rows=config.skip_broken_rows,
        cluster=cluster,
    )
    return hold_out(task, config.ppo_examples)


def thoughts_warning(config: Config, examples: Dataset) -> str | None:
    """Say that the messages of the first examples have thoughts that are left out; None where they have none."""
    column, names = config.messages or config.completion, examples.column_names
    column = f"data_{column}" if f"data_{column}" in names else column
    if column not in names:
        return None
    key = thought_key(examples.select(range(min(LOOKED_AT, len(examples))))[column])
    return key and (
        f"warning: task.{'messages' if config.messages else 'completion'}: {key!r} of the messages is left out, and "
        "the model learns answers without thoughts; to keep them write <think>...</think> into the content"
    )


def check_clusters(column: str, labels: Sequence[object], where: Where) -> None:
    """Refuse rows that name no cluster.

    Raises:
        TaskError: saying where they are.
    """
    empty = [row for row, label in enumerate(labels) if label is None]
    if empty:
        raise TaskError(f"task.cluster: the column {column!r} is null in {where(empty)}; name a cluster in each row")


def read_tables(config: Config) -> dict[str, SourceTable]:
    """Read each split's file or data set, which may hold more than the split.

    Raises:
        TaskError: a split that is not there, or a file that cannot be read.
    """
    names = {split: split_name(getattr(config, split)) for split in SPLITS}
    if not config.is_local:
        data = read_hub(config.path, config.subset, config.revision)
        return {split: _named(data, name, split) for split, name in names.items()}
    paths = {split: config.local_path(name) for split, name in names.items()}
    read = {
        path: read_saved(path) if path.is_dir() else {"": read_file(path, config.skip_broken_rows)}
        for path in dict.fromkeys(paths.values())
    }
    # A file is one split whatever its name, and so is each directory of a path with {split} in it.
    return {
        split: next(iter(read[path].values()))
        if len(read[path]) == 1 and (path.is_file() or "{split}" in config.path)
        else _named(read[path], names[split], split)
        for split, path in paths.items()
    }


def _named(tables: dict[str, SourceTable], name: str, split: str) -> SourceTable:
    if name not in tables:
        raise TaskError(
            f"task.{split}: the data has no split {name!r}; there are: {', '.join(tables)}; "
            f"name one of them, or a part such as {next(iter(tables))}[90%:]"
        )
    return tables[name]
