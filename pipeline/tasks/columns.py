"""Map the columns of any data set: a Hub id, json, jsonl, csv, tsv or parquet files, a `save_to_disk` directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, List, Value

from pipeline.runtime.files import sha256
from pipeline.tasks.examples import (
    Reader,
    check_columns,
    leave_out,
    placeholders,
    read_chat,
    read_prompt,
    read_references,
    read_row,
    read_text,
)
from pipeline.tasks.parts import check_disjoint, check_part, select_part, split_name
from pipeline.tasks.tables import SUFFIXES, Table, check_hub, read_file, read_hub, read_saved
from pipeline.tasks.text_rows import Row
from pipeline.tasks.types import RESERVED_COLUMNS, SPLITS, Task, TaskError, check_limits, hold_out

# What reward functions get under names of their own beside the columns.
TAKEN_COLUMNS = (*RESERVED_COLUMNS, "prompts", "completions", "completion_ids")
SOURCE = "".join(sha256(Path(__file__).with_name(name)) for name in ("columns.py", "examples.py"))
SAVED_MARKERS = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class Config:
    """Say where the rows are, and which columns make an example.

    `path` is a local file (.json, .jsonl, .csv, .tsv, .parquet; `{split}` in it stands for the name of the split), a
    directory written by `save_to_disk`, or a Hub id, which `subset` and `revision` belong to. Relative paths start at
    `data_dir`; with another `data_dir` than the default, `path` is never a Hub id. In a recipe, `{recipe_dir}` in
    `data_dir` stands for the folder of the recipe's file. `train`, `validation` and `test` name the splits of the
    data, or parts of one: `train[:90%]` and `train[90%:]`. A file without `{split}` is all `train`.

    `prompt` and `completion` are each the name of a column that holds text, or a template with `{column}` in it;
    `{answers[text][0]}` reaches into a column. `references` is such a name or template, of a text or a list of texts.
    Without `completion` the first reference is the completion, without `references` the completion is the reference.

    `messages` is a column of chat messages, each with a role and a content, in place of the three: the last assistant
    message is the completion and those before it are the prompt; what follows it, and other keys of a message, are
    left out. `system` is put in front of a chat that does not begin with a system message.

    Every column of the data travels to the reward functions; one called like what they get anyway (TAKEN_COLUMNS) is
    renamed: `prompt` to `data_prompt`. `language` is that of the completions.

    `skip_broken_rows` leaves out, reports and counts rows that cannot be parsed or whose values cannot be used;
    without it they are errors.
    """

    path: str  # a file with {split} in its name, a save_to_disk directory, or a Hub id
    data_dir: str = "."  # where relative paths start; {recipe_dir} is the folder of the recipe
    subset: str | None = None  # of a Hub data set
    revision: str | None = None  # branch, tag or commit of a Hub data set
    train: str = "train"  # name of the split, or a part of one such as train[:90%]
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    prompt: str | None = None  # a column, or a template such as 'Question: {question}'
    completion: str | None = None  # what SFT learns; None: the first reference
    references: str | None = None  # a text or a list of texts; None: the completion
    messages: str | None = None  # a column of chat messages, in place of the three above
    system: str | None = None  # put in front of chats without a system message
    language: str | None = None  # of the completions, such as de: metrics choose their tokenizer by it
    max_train_examples: int | None = None  # keep the first rows only
    max_validation_examples: int | None = None  # likewise
    max_test_examples: int | None = None  # likewise
    ppo_examples: int | None = None  # the last training rows, which SFT does not see and PPO answers
    skip_broken_rows: bool = False  # leave out and count rows that cannot be used, instead of stopping

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise TaskError("task.path: empty; give a file such as data/{split}.jsonl, or a Hub id")
        for split in SPLITS:
            check_part(getattr(self, split), split)
        self._check_columns()
        check_limits(
            max_train_examples=self.max_train_examples,
            max_validation_examples=self.max_validation_examples,
            max_test_examples=self.max_test_examples,
            ppo_examples=self.ppo_examples,
        )

    def _check_columns(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            raise TaskError(f"task: set exactly one of prompt and messages, found {found}")
        if self.messages is None and self.completion is None and self.references is None:
            raise TaskError("task: set completion or references, or both, found neither")
        if self.messages is not None and self.completion is not None:
            raise TaskError("task.completion: it would do nothing: the last assistant message is the completion")
        if self.messages is None and self.system is not None:
            raise TaskError("task.system: it would do nothing: only chats have a system message; set task.messages")
        for key in ("prompt", "completion", "references"):
            if (value := getattr(self, key)) is not None:
                placeholders(value, key)

    def local_path(self, split: str) -> Path:
        """Return the path of a split, if the data are local."""
        return Path(self.data_dir).expanduser() / Path(self.path.replace("{split}", split)).expanduser()

    @property
    def is_local(self) -> bool:
        """Return whether `path` is a file or directory, by its form or because it exists."""
        looks_local = self.path.startswith((".", "/", "~")) or self.path.count("/") > 1 or "{split}" in self.path
        has_suffix = Path(self.path).suffix.lower() in SUFFIXES
        return looks_local or has_suffix or self.data_dir != "." or self.local_path("").exists()


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
    found: dict[Path, None] = {}
    for split in SPLITS:
        path = config.local_path(split_name(getattr(config, split)))
        if path.is_dir():
            _check_saved(path)
            inside = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("cache-"))
            found |= dict.fromkeys(inside)
        else:
            _check_file(config, split, path)
            found[path] = None
    return list(found)


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
    check_disjoint({split: (getattr(config, split), len(tables[split].rows)) for split in SPLITS})
    splits, broken = {}, [line for table in tables.values() for line in table.broken]
    for split in SPLITS:
        part = select_part(tables[split], split, getattr(config, split), getattr(config, f"max_{split}_examples"))
        splits[split], left_out = _make_split(config, part)
        broken += left_out
    left_out = tuple(dict.fromkeys(broken))  # splits may be parts of one file
    return hold_out(Task(**splits, language=config.language, left_out=left_out), config.ppo_examples)


def read_tables(config: Config) -> dict[str, Table]:
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


def _named(tables: dict[str, Table], name: str, split: str) -> Table:
    if name not in tables:
        raise TaskError(
            f"task.{split}: the data has no split {name!r}; there are: {', '.join(tables)}; "
            f"name one of them, or a part such as {next(iter(tables))}[90%:]"
        )
    return tables[name]


def _make_split(config: Config, table: Table) -> tuple[Dataset, tuple[str, ...]]:
    """Make the examples of a table; the second value describes the rows that were left out."""
    readers = _readers(config)
    for key, expression, _ in readers:
        check_columns(table, key, expression)
    data = table.dataset
    names = _new_names(data.column_names)
    text = Value("string")
    prompt = text if config.messages is None else List({"role": text, "content": text})
    features = Features(
        {"prompt": prompt, "completion": text, "references": List(text), "problem": text}
        | {names[column]: data.features[column] for column in data.column_names}
    )
    read = partial(
        data.map,
        _example,
        fn_kwargs={"readers": readers, "names": names, "source": SOURCE},
        remove_columns=data.column_names,
        features=features,
        load_from_cache_file=False,  # the functions that `_example` calls are no part of the cache's key
        desc="Reading examples",
    )
    try:
        examples = read()
    except OSError:  # a folder that cannot be written, or a full disk
        examples = read(keep_in_memory=True)
    table, kept = leave_out(table, examples["problem"][:], config.skip_broken_rows)
    examples = examples.remove_columns("problem")
    return examples if len(kept) == len(examples) else examples.select(kept), table.broken


def _example(row: Row, readers: Sequence[Reader], names: Mapping[str, str], source: str) -> Row:
    """Return the prompt, completion and references of a row, and its columns under their new names.

    `source` changes with the code, and so does the key of what `datasets` caches of the examples, such as tokens.
    """
    values, problem = read_row(readers, row)
    example = dict.fromkeys(("prompt", "completion", "references")) | {"problem": problem}
    if problem is None:
        example |= zip((key for key, _, _ in readers), values, strict=True)
        if "messages" in example:
            *example["prompt"], answer = example.pop("messages")
            example["completion"] = answer["content"]
        if example["completion"] is None:
            example["completion"] = example["references"][0]
        example["references"] = example["references"] or [example["completion"]]
    return example | {new: row[column] for column, new in names.items()}


def _new_names(columns: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for column in columns:
        name = column
        while name in TAKEN_COLUMNS or (name != column and name in columns):
            name = f"data_{name}"
        names[column] = name
    return names


def _readers(config: Config) -> list[Reader]:
    """Return a reader of everything that makes an example."""
    readers: list[Reader] = []
    if config.references is not None:
        readers.append(("references", config.references, read_references))
    if config.messages is not None:
        return [*readers, ("messages", config.messages, partial(read_chat, system=config.system))]
    readers.append(("prompt", config.prompt, read_prompt))
    return readers if config.completion is None else [*readers, ("completion", config.completion, read_text)]
