"""The files that a user names, as the keys of a task: which file is which split, and the columns of the first rows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.metrics.text import language_code
from pipeline.tasks import TaskError
from pipeline.tasks.detection import guess_columns
from pipeline.tasks.parallel import read_lines
from pipeline.tasks.tables import SUFFIXES, read_file

NAMES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}  # of files beside one of `train`
PARTS = {"train": "train[:80%]", "validation": "train[80%:90%]", "test": "train[90%:]"}  # of a file that is all data
SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # the same of parallel files
PARALLEL_PROMPT = "{source}\n"


@dataclass(frozen=True)
class DataFiles:
    """A kind of task, its keys that say where the splits are, and a guess at those that say what an example is.

    `problem` says why there is no guess, and `pieces` are the files that the splits still have to be written to.
    """

    task: str
    places: dict[str, str]
    guess: dict[str, str]
    problem: str | None = None
    pieces: dict[Path, str] | None = None


def find_data(names: Sequence[str], recipe: Path) -> DataFiles:
    """Look at the one or two files that a user names; paths in the keys start at the folder of the recipe.

    Raises:
        TaskError: a file that is not there, one in no known format, or parallel files of unequal length.
    """
    for name in names:
        if not (file := Path(name.replace("{split}", "train")).expanduser()).is_file():
            raise TaskError(f"--data: no file {str(file)!r}; give a file with examples")
    if len(names) == 1:
        return _columns(names[0], recipe)
    if len(names) == 2:
        return _parallel(names, recipe)
    raise TaskError(f"--data: give one file, or two of parallel text, found {len(names)}")


def _columns(name: str, recipe: Path) -> DataFiles:
    file = Path(name.replace("{split}", "train")).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise TaskError(
            f"--data: {name!r} is in no known format; give a file whose name ends in {', '.join(SUFFIXES)}, or two "
            "files of parallel text"
        )
    split = _with_split(name)
    places = {"path": _from_folder(name, recipe), **PARTS}
    if split is not None:
        places = {"path": _from_folder(split[0], recipe), **split[1]}
    data = read_file(file).dataset
    try:
        return DataFiles("columns", places, guess_columns(data))
    except TaskError as error:
        return DataFiles("columns", places, {}, str(error))


def _parallel(names: Sequence[str], recipe: Path) -> DataFiles:
    """Return the keys of two files; where there is no pair for each split, what the three pairs are to hold."""
    endings = [Path(name).suffix for name in names]
    if endings[0] == endings[1]:
        endings = [".source", ".target"]
    guess = {"prompt": PARALLEL_PROMPT, **_language(endings[1])}
    split_files = [_with_split(name) for name in names]
    if split_files[0] is not None and split_files[1] is not None and split_files[0][1] == split_files[1][1]:
        places = {"source": _from_folder(split_files[0][0], recipe), "target": _from_folder(split_files[1][0], recipe)}
        return DataFiles("parallel", places | split_files[0][1], guess)
    lines = [read_lines(Path(name).expanduser()) for name in names]
    if len(lines[0]) != len(lines[1]):
        raise TaskError(
            f"--data: {names[0]!r} has {len(lines[0])} lines and {names[1]!r} has {len(lines[1])}: parallel files "
            "must match line by line"
        )
    folder = recipe.parent / f"{recipe.stem}_data"
    if folder.exists():
        raise TaskError(f"--data: {str(folder)!r} exists, where the three splits would be written; remove it")
    pieces = {}
    for split, (start, stop) in SHARES.items():
        for ending, side in zip(endings, lines, strict=True):
            piece = side[round(start * len(side)) : round(stop * len(side))]
            pieces[folder / f"{split}{ending}"] = "".join(f"{line}\n" for line in piece)
    places = {key: f"{folder.name}/{{split}}{end}" for key, end in zip(("source", "target"), endings, strict=True)}
    return DataFiles("parallel", places, guess, pieces=pieces)


def _language(ending: str) -> dict[str, str]:
    """Return the language that the ending of a file names, such as `.de`."""
    try:
        return {"language": language_code(ending[1:])} if len(ending) == 3 else {}
    except ValueError:
        return {}


def _with_split(name: str) -> tuple[str, dict[str, str]] | None:
    """Return a name with `{split}` in it and what that stands for in each split; None for a file on its own."""
    if "{split}" in name:
        return name, {}
    folder, file = os.path.split(name)
    if "train" not in file:
        return None
    names = {
        split: next((n for n in words if (Path(folder) / file.replace("train", n, 1)).expanduser().is_file()), None)
        for split, words in NAMES.items()
    }
    if None in names.values():
        return None
    return os.path.join(folder, file.replace("train", "{split}", 1)), {k: n for k, n in names.items() if k != n}


def _from_folder(name: str, recipe: Path) -> str:
    """Return a path as it is from the folder of the recipe; an absolute one as it is."""
    path = os.path.expanduser(name)
    return path if os.path.isabs(path) else os.path.relpath(path, recipe.parent)
