"""The state of what a stage reads, as a text to compare: of files, of model directories, of models on the Hub."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.models.hub import cached_commit
from pipeline.runtime.files import sha256
from pipeline.stages.directory import FINISHED

Stamp = tuple[str, int, int]  # path, size in bytes, time of change in nanoseconds

_digests: dict[Stamp, str] = {}  # of this process; a data file is read once, not once for each question about a stage


def file_stamp(path: Path) -> Stamp:
    """Return the path, size and time of change of a file."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; it is read only if its size or its time of change is new to this process."""
    stamp = file_stamp(path)
    if stamp not in _digests:
        _digests[stamp] = sha256(path)
    return _digests[stamp]


def remember_digests(stamps: Iterable[Stamp], digests: Mapping[str, str]) -> None:
    """Take over the digests of files, by path, that a stage has recorded with the stamps the files had then."""
    for path, size, changed in stamps:
        if path in digests:
            _digests.setdefault((path, size, changed), digests[path])


def record_digest(directory: Path) -> str | None:
    """Return the SHA-256 of a stage's stage.json, or None if the stage is not finished."""
    file = directory / FINISHED
    return sha256(file) if file.is_file() else None


def model_state(path: str, revision: str) -> str | None:
    """Return the state of a model; None for a model on the Hub of which nothing is in the local cache.

    A directory made by a stage is known by its stage.json, any other directory by the names, sizes and times of its
    files, and a model on the Hub by the commit of its snapshot in the local cache. Nothing goes to the network.
    """
    directory = Path(path).expanduser()
    return directory_state(directory) if directory.is_dir() else cached_commit(path, revision)


def files_state(files: Sequence[Path]) -> str:
    """Return the state of files that are too many to be read: their paths, sizes and times of change."""
    return hashlib.sha256(json.dumps([_stamp_if_there(path) for path in files]).encode()).hexdigest()


def _stamp_if_there(path: Path) -> Stamp | str:
    try:
        return file_stamp(path)
    except OSError:
        return str(path)


def directory_state(directory: Path) -> str:
    """Return the state of a directory that holds a model."""
    record = record_digest(directory)
    if record is not None:
        return record
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(directory.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
