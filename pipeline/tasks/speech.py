"""Read speech and what was said: a column of sound (paths, arrays or `datasets.Audio`) and a column of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Audio, Dataset, Value

from pipeline.tasks import columns
from pipeline.tasks.examples import check_columns, describe_value, leave_out
from pipeline.tasks.parts import check_disjoint, select_part
from pipeline.tasks.tables import SourceTable
from pipeline.tasks.types import RESERVED_COLUMNS, SPLITS, Task, TaskError, hold_out

SOUND, CLIP, LANGUAGE = "sound", "clip", "spoken_language"  # columns that the stages need; the second one is theirs
TAKEN_COLUMNS = (*RESERVED_COLUMNS, "prompts", "completions", "completion_ids", SOUND, CLIP, LANGUAGE)
NO_TEXT = "the text is empty"


@dataclass(frozen=True)
class Config:
    """Say where the rows are, and which columns hold the sound and the text.

    `path`, `data_dir`, `subset`, `revision` and the three splits are those of the task `columns`. The column `audio`
    holds the path of a sound file, which starts at `data_dir`; an array with its `sampling_rate`; or the `Audio` of
    `datasets`. The model's feature extractor resamples it. The column `text` holds what was said.

    `language` is that of all texts (an ISO 639-1 code such as en), or `language_column` holds that of each row: a
    multilingual model is told it. Rows without a text, and clips that are longer than the model's window, are left out
    and counted. Other columns travel to the reward functions; the columns of sound do not.
    """

    path: str  # a file with {split} in its name, a save_to_disk directory, or a Hub id
    data_dir: str = (
        "."  # where relative paths start, those of sound files too; {recipe_dir} is the folder of the recipe
    )
    subset: str | None = None  # of a Hub data set
    revision: str | None = None  # branch, tag or commit of a Hub data set
    train: str = "train"  # name of the split, or a part of one such as train[:90%]
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    audio: str = "audio"  # the column of sound
    text: str = "text"  # the column of what was said
    language: str | None = None  # of all texts, such as en; a model of one language needs none
    language_column: str | None = None  # a column with the language of each row, in place of it
    max_train_examples: int | None = None  # keep the first rows only
    max_validation_examples: int | None = None  # likewise
    max_test_examples: int | None = None  # likewise
    ppo_examples: int | None = None  # the last training rows, which SFT does not see and PPO answers
    cluster: str | None = None  # a column, such as the speaker: test rows with equal values are resampled together
    skip_broken_rows: bool = False  # leave out and count rows that cannot be used, instead of stopping

    def __post_init__(self) -> None:
        if self.language is not None and self.language_column is not None:
            raise TaskError("task: set language or language_column, found both")
        self.as_columns()  # whose checks are these too

    def as_columns(self) -> columns.Config:
        """Return the same data as a task of columns sees them."""
        return columns.Config(
            path=self.path,
            data_dir=self.data_dir,
            subset=self.subset,
            revision=self.revision,
            train=self.train,
            validation=self.validation,
            test=self.test,
            prompt=self.audio,
            completion=self.text,
            language=self.language,
            max_train_examples=self.max_train_examples,
            max_validation_examples=self.max_validation_examples,
            max_test_examples=self.max_test_examples,
            ppo_examples=self.ppo_examples,
            cluster=self.cluster,
            skip_broken_rows=self.skip_broken_rows,
        )


def files(config: Config) -> list[Path]:
    """Return the local files with the rows; `sound_files` are not among them. None for the Hub.

    Raises:
        TaskError: as `columns.files`.
    """
    return columns.files(config.as_columns())


def sound_files(config: Config) -> list[Path]:
    """Return the sound files that the rows of local data name, whether they are there or not. None for the Hub.

    Raises:
        TaskError: as `files`; rows that cannot be read.
    """
    if not files(config):
        return []
    paths: dict[Path, None] = {}
    tables = columns.read_tables(config.as_columns())
    for split in SPLITS:
        part = select_part(tables[split], split, getattr(config, split), getattr(config, f"max_{split}_examples"))
        data = part.dataset
        if config.audio not in data.column_names:
            continue
        sounds = _undecoded(data.select_columns(config.audio), config.audio)
        name, start = config.audio, Path(config.data_dir).expanduser()
        if not isinstance(sounds.features[name], Value):  # its bytes or samples, if it has them, are in the data
            sounds, name, start = sounds.flatten(), f"{name}.path", Path()
        if name in sounds.column_names:
            paths |= {start / Path(path).expanduser(): None for path in sounds[name][:] if isinstance(path, str)}
    return list(paths)


def check_reachable(config: Config) -> None:
    """Refuse a Hub data set that can neither be asked for on the Hub nor found in the cache, in seconds.

    Raises:
        TaskError: as `columns.check_reachable`.
    """
    columns.check_reachable(config.as_columns())


def load(config: Config) -> Task:
    """Read the rows and make the three splits, which share none; the sound itself is not read yet.

    Raises:
        TaskError: as `columns.load`; a row without a path, an array or a language.
    """
    source = config.as_columns()
    columns.files(source)
    columns.check_reachable(source)
    tables = columns.read_tables(source)
    check_disjoint({split: (getattr(config, split), len(tables[split].rows)) for split in SPLITS})
    splits, places, left_out = {}, {}, [line for table in tables.values() for line in table.broken]
    for split in SPLITS:
        part = select_part(tables[split], split, getattr(config, split), getattr(config, f"max_{split}_examples"))
        splits[split], table = _make_examples(config, part)
        places[split] = table.where
        left_out += table.broken
    cluster = None if config.cluster is None else _new_name(config.cluster)
    if cluster is not None:
        columns.check_clusters(config.cluster, splits["test"][cluster], places["test"])
    task = Task(
        **splits,
        language=config.language,
        left_out=tuple(dict.fromkeys(left_out)),  # splits may be parts of one file
        places=places,
        skip_broken_rows=config.skip_broken_rows,
        cluster=cluster,
        sound=SOUND,
    )
    return hold_out(task, config.ppo_examples)


def _make_examples(config: Config, table: SourceTable) -> tuple[Dataset, SourceTable]:
    """Make the examples of a table; return them and the table of the same rows, which describes those left out."""
    keys = {"audio": config.audio, "text": config.text, "language_column": config.language_column}
    for key, column in keys.items():
        if column is not None:
            check_columns(table, key, column)
    if config.cluster is not None:
        check_columns(table, "cluster", config.cluster)
    data = _undecoded(table.dataset, config.audio)
    texts, sounds = data[config.text][:], data.select_columns(config.audio)
    problems = [
        _problem(config, text, language, sound[config.audio])
        for text, language, sound in zip(texts, _languages(config, data), sounds, strict=True)
    ]
    table, kept = leave_out(table, [NO_TEXT if problem == NO_TEXT else None for problem in problems], True)
    problems, data = [problems[row] for row in kept], data.select(kept)
    table, kept = leave_out(table, problems, config.skip_broken_rows)
    return _as_examples(config, data.select(kept)), table


def _undecoded(data: Dataset, column: str) -> Dataset:
    """Return the data with the bytes of an `Audio` column, which a clip is read from when its features are made."""
    feature = data.features[column]
    return data.cast_column(column, Audio(decode=False)) if isinstance(feature, Audio) else data


def _languages(config: Config, data: Dataset) -> Sequence[object]:
    return [config.language] * len(data) if config.language_column is None else data[config.language_column][:]


def _problem(config: Config, text: object, language: object, sound: object) -> str | None:
    """Say why a row gives no example; None where it gives one."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return NO_TEXT
    if not isinstance(text, str):
        return f"task.text: the column {config.text!r} {describe_value(text)}, expected a text"
    if config.language_column is not None and not (isinstance(language, str) and language.strip()):
        return f"task.language_column: the column {config.language_column!r} {describe_value(language)}"
    if isinstance(sound, str) and sound.strip():
        missing = not _path(config, sound).is_file()
        return f"task.audio: there is no file {str(_path(config, sound))!r}" if missing else None
    if isinstance(sound, Mapping):
        if sound.get("array") is not None:
            has_rate = sound.get("sampling_rate") is not None
            return None if has_rate else f"task.audio: the array in {config.audio!r} has no sampling_rate"
        if sound.get("bytes") is not None or sound.get("path") is not None:
            return None
    kind = "is empty" if sound in ("", {}) else describe_value(sound)
    return f"task.audio: the column {config.audio!r} {kind}, expected a path, or an array with its sampling_rate"


def _path(config: Config, path: str) -> Path:
    return Path(config.data_dir).expanduser() / Path(path).expanduser()


def _as_examples(config: Config, data: Dataset) -> Dataset:
    """Turn rows that can be used into examples: the prompt is what the sound is called in the data."""
    texts, languages = [text.strip() for text in data[config.text][:]], list(_languages(config, data))
    is_path = isinstance(data.features[config.audio], Value)
    names = {name: _new_name(name) for name in data.column_names}
    if not is_path:
        names[config.audio] = SOUND
    data = data.rename_columns({old: new for old, new in names.items() if old != new})
    if is_path:
        prompts = data[names[config.audio]][:]
        sounds = [str(_path(config, name).absolute()) for name in prompts]
    else:
        prompts = [_name(sound[SOUND], row) for row, sound in enumerate(data.select_columns(SOUND))]
    made = {"prompt": prompts, "completion": texts, "references": [[text] for text in texts], LANGUAGE: languages}
    for name, values in ({**made, SOUND: sounds} if is_path else made).items():
        data = data.add_column(name, values)
    return data


def _name(sound: Mapping[str, object], row: int) -> str:
    return str(sound.get("path") or f"clip {row}")


def _new_name(column: str) -> str:
    return f"data_{column}" if column in TAKEN_COLUMNS else column
