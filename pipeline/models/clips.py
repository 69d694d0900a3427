"""The features of clips: made once for a model, kept in a file, and read from there one clip at a time."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm
from transformers import PretrainedConfig, WhisperFeatureExtractor

from pipeline.models.audio import UnusableSound, read_samples
from pipeline.models.speech import CLIP, FRAMES_PER_POSITION, POSITIONS_PER_SECOND
from pipeline.runtime.files import sha256

SOURCE = sha256(Path(__file__)) + sha256(Path(__file__).with_name("audio.py"))  # of whose results a file is made
FEATURES_FILE, INDEX_FILE = "features.f32", "clips.json"
SAID_FROM = 200  # clips; of fewer there is no progress bar


class TooLongError(UnusableSound):
    """A clip is longer than the model's window."""


@dataclass(frozen=True)
class ClipFeatures:
    """The clips of some rows, as the column `clip` holds them without a language; and why a row has none, by row."""

    clips: list[dict[str, object] | None]
    problems: dict[int, str]
    too_long: frozenset[int] = frozenset()


def feature_extractor(config: PretrainedConfig) -> WhisperFeatureExtractor:
    """Return what makes the features that a Whisper model was trained with; its configuration says all of it."""
    seconds = config.max_source_positions // POSITIONS_PER_SECOND
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)


def make_clips(sounds: Dataset, column: str, config: PretrainedConfig, directory: Path | None = None) -> ClipFeatures:
    """Make the features of the sound in a column for a model of this configuration, or find those made before.

    Every process calls it; one of each machine makes the features. They are kept in `directory`, or where `datasets`
    keeps its own.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "relay-clips" if directory is None else directory
    rows = sounds.select_columns(column)
    folder = root / _digest((row[column] for row in rows), config)
    with PartialState().local_main_process_first():  # machines may have caches of their own
        if not (folder / INDEX_FILE).is_file():
            _write_features(rows, column, config, folder)
    return _read_index(folder, config)


def hear(
    dataset: Dataset,
    column: str,
    config: PretrainedConfig,
    language: str | None = None,
    directory: str | Path | None = None,
) -> Dataset:
    """Return a data set with the column `clip` that trainers need, from a column of sound; for use from Python.

    Raises:
        ValueError: a clip that cannot be used, naming its row.
    """
    features = make_clips(dataset, column, config, None if directory is None else Path(directory))
    if features.problems:
        row, problem = next(iter(features.problems.items()))
        raise ValueError(f"the clip in row {row} (the first is row 0) {problem}")
    clips = [{**clip, "language": language} for clip in features.clips]
    return dataset.remove_columns(column).add_column(CLIP, clips)


def _digest(sounds: Iterable[str | Mapping[str, object]], config: PretrainedConfig) -> str:
    """Return what the features follow from: the sound, the model's window and bins, and the code."""
    digest = hashlib.sha256(f"{SOURCE} {config.num_mel_bins} {config.max_source_positions}\n".encode())
    for sound in sounds:
        if isinstance(sound, str) or (sound.get("bytes") is None and sound.get("array") is None):
            digest.update(_file_state(str(sound if isinstance(sound, str) else sound.get("path"))))
        elif sound.get("array") is not None:
            digest.update(f"{sound.get('sampling_rate')} ".encode() + np.asarray(sound["array"]).tobytes())
        else:
            digest.update(hashlib.sha256(sound["bytes"]).digest())
    return digest.hexdigest()[:32]


def _file_state(path: str) -> bytes:
    try:
        state = os.stat(os.path.expanduser(path))
        # The last one changes also where a copy keeps the time of its original.
        return f"{path} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\n".encode()
    except OSError:
        return f"{path} missing\n".encode()


def _write_features(rows: Dataset, column: str, config: PretrainedConfig, folder: Path) -> None:
    """Write the features of all rows into one file, and where each row's are into another.

    Another run or machine may write the same at the same time; the first that ends is kept.
    """
    temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_into(temporary, rows, column, config)
        if not (folder / INDEX_FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except OSError:
        if not (folder / INDEX_FILE).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_into(directory: Path, rows: Dataset, column: str, config: PretrainedConfig) -> None:
    extractor, position, entries = feature_extractor(config), 0, []
    with (directory / FEATURES_FILE).open("wb") as file:
        for row in tqdm(
            rows, desc="Reading sound", disable=len(rows) < SAID_FROM or not PartialState().is_main_process
        ):
            try:
                frames = _extract(row[column], extractor)
            except UnusableSound as problem:
                entries.append({"problem": str(problem), "too_long": isinstance(problem, TooLongError)})
                continue
            entries.append({"start": position, "frames": len(frames)})
            file.write(frames.tobytes())
            position += len(frames)
    (directory / INDEX_FILE).write_text(json.dumps(entries))


def _extract(sound: str | Mapping[str, object], extractor: WhisperFeatureExtractor) -> np.ndarray:
    """Make the features of one clip up to the first frame of the silence after it, [frames, num_mel_bins]."""
    rate = extractor.sampling_rate
    samples = read_samples(sound, rate)
    if len(samples) > extractor.n_samples:
        raise TooLongError(
            f"has {len(samples) / rate:.1f} s, and the model hears {extractor.n_samples / rate:g} s at a time"
        )
    features = extractor(samples, sampling_rate=rate, return_tensors="np")["input_features"][0]
    # The first frame whose window of `n_fft` samples begins after the clip; those after it are equal.
    silent = -(-(len(samples) + extractor.n_fft // 2) // extractor.hop_length)
    return np.ascontiguousarray(features[:, : silent + 1].T, dtype=np.float32)


def _read_index(folder: Path, config: PretrainedConfig) -> ClipFeatures:
    entries: Sequence[dict] = json.loads((folder / INDEX_FILE).read_text())
    shape = {
        "num_mel_bins": config.num_mel_bins,
        "window": FRAMES_PER_POSITION * config.max_source_positions,
    }
    path = str((folder / FEATURES_FILE).absolute())
    return ClipFeatures(
        [None if "problem" in entry else {"path": path, **entry, **shape} for entry in entries],
        {row: entry["problem"] for row, entry in enumerate(entries) if "problem" in entry},
        frozenset(row for row, entry in enumerate(entries) if entry.get("too_long")),
    )
