"""Features of clips are those of the model's own extractor, made once, and read from a file one clip at a time."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from speech_toys import tone, write_wav
from transformers import WhisperConfig

from pipeline.models import clips
from pipeline.models.audio import read_samples
from pipeline.models.clips import feature_extractor, hear, make_clips
from pipeline.models.speech import Clip

CONFIG = WhisperConfig(num_mel_bins=16, max_source_positions=50)


def sounds(*paths) -> Dataset:
    return Dataset.from_dict({"sound": [str(path) for path in paths]})


@pytest.fixture
def files(tmp_path):
    words = (["one"], ["two", "three"], ["one", "two", "three", "four", "five"])
    return [write_wav(tmp_path / f"{number}.wav", tone(list(text))) for number, text in enumerate(words)]


def test_the_extractor_is_that_of_openai_models():
    extractor = feature_extractor(WhisperConfig())
    assert (extractor.chunk_length, extractor.feature_size, extractor.sampling_rate) == (30, 80, 16000)


def test_features_are_the_extractors_to_the_last_bit(files, tmp_path):
    made, extractor = make_clips(sounds(*files), "sound", CONFIG, tmp_path / "features"), feature_extractor(CONFIG)
    assert made.problems == {} and len(made.clips) == 3
    for path, clip in zip(files, made.clips, strict=True):
        samples = read_samples(str(path), 16000)
        expected = extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"][0]
        features = Clip(**clip).features()
        assert features.shape == (16, 100) and np.array_equal(features.numpy(), expected)
        assert clip["frames"] < len(samples) / 160 + 4  # of the silence after a clip one frame is kept
    assert not torch.equal(Clip(**made.clips[0]).features(), Clip(**made.clips[1]).features())


def test_they_are_made_once_and_again_for_other_files_or_models(files, tmp_path, monkeypatch):
    made, made_for = make_clips(sounds(*files), "sound", CONFIG, tmp_path / "features"), []
    monkeypatch.setattr(
        clips, "_write_features", lambda *arguments: made_for.append(arguments[-1]) or write(*arguments)
    )
    assert make_clips(sounds(*files), "sound", CONFIG, tmp_path / "features") == made and made_for == []
    make_clips(sounds(*files), "sound", WhisperConfig(num_mel_bins=8, max_source_positions=50), tmp_path / "features")
    os.utime(files[0], (1, 1))
    make_clips(sounds(*files), "sound", CONFIG, tmp_path / "features")
    assert len(set(made_for)) == 2


def test_a_changed_file_of_the_same_size_and_time_has_its_own_features(files, tmp_path):
    before = make_clips(sounds(files[0]), "sound", CONFIG, tmp_path / "features").clips[0]
    kept, features = os.stat(files[0]), Clip(**before).features()
    write_wav(files[0], tone(["five"]))
    os.utime(files[0], ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert os.stat(files[0]).st_size == kept.st_size
    after = make_clips(sounds(files[0]), "sound", CONFIG, tmp_path / "features").clips[0]
    assert not torch.equal(Clip(**after).features(), features)


write = clips._write_features


def test_an_interrupted_file_is_made_again(files, tmp_path):
    made = make_clips(sounds(*files), "sound", CONFIG, tmp_path / "features")
    folder = next((tmp_path / "features").iterdir())
    before = (folder / "features.f32").read_bytes()
    (folder / "clips.json").unlink()
    (folder / "features.f32").write_bytes(b"half")
    assert make_clips(sounds(*files), "sound", CONFIG, tmp_path / "features") == made
    assert (folder / "features.f32").read_bytes() == before


def test_two_runs_may_make_the_same_features_at_once(files, tmp_path, monkeypatch):
    rows, extract, numbers, others = sounds(*files), clips._extract, itertools.count(), []

    def while_another_run_does(*arguments):
        if not others:  # in the middle of the first run
            others.append(None)
            others[0] = make_clips(rows, "sound", CONFIG, tmp_path / "features")
        return extract(*arguments)

    monkeypatch.setattr(clips.os, "getpid", lambda: next(numbers))
    monkeypatch.setattr(clips, "_extract", while_another_run_does)
    made = make_clips(rows, "sound", CONFIG, tmp_path / "features")
    assert made == others[0] and np.isfinite(Clip(**made.clips[2]).features()).all()
    assert len(list((tmp_path / "features").iterdir())) == 1  # nothing is left of the second


def test_problems_are_kept_by_row(files, tmp_path):
    long = write_wav(tmp_path / "long.wav", tone(["one"] * 7))
    rows = sounds(files[0], long, tmp_path / "missing.wav", files[1])
    made = make_clips(rows, "sound", CONFIG, tmp_path / "features")
    assert "has 1.2 s, and the model hears 1 s at a time" in made.problems[1] and made.too_long == {1}
    assert "cannot be opened" in made.problems[2] and set(made.problems) == {1, 2}
    assert made.clips[1] is None and np.isfinite(Clip(**made.clips[3]).features()).all()
    assert make_clips(rows, "sound", CONFIG, tmp_path / "features") == made
    with pytest.raises(ValueError, match=r"the clip in row 1 .* has 1.2 s"):
        hear(rows, "sound", CONFIG, directory=tmp_path / "features")


def test_bytes_and_arrays_are_told_apart_by_what_is_in_them(files, tmp_path):
    made = []
    for path in files[:2]:
        for sound in (
            {"bytes": path.read_bytes(), "path": None},
            {"array": tone(["one"]).tolist(), "sampling_rate": 8000},
        ):
            data = Dataset.from_list([{"sound": sound}])
            made.append(make_clips(data, "sound", CONFIG, tmp_path / "features").clips[0]["path"])
    assert len(set(made)) == 3  # the array is the same both times


def test_a_data_set_is_heard_from_python(files, tmp_path):
    rows = sounds(*files).add_column("prompt", ["a", "b", "c"])
    heard = hear(rows, "sound", CONFIG, "en", tmp_path / "features")
    assert heard.column_names == ["prompt", "clip"] and heard[1]["clip"]["language"] == "en"
    assert json.dumps(heard[1])  # small values alone
