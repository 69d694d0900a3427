"""The task `speech`: rows of sound and text, as paths, arrays and `datasets.Audio`; broken ones have one sentence."""

import json
from pathlib import Path

import pytest
from datasets import Audio, Dataset, DatasetDict
from speech_toys import TONES, tone, write_data, write_wav

from pipeline.tasks import TaskError, load_task, speech


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path, train=4)


def config(folder, **keys) -> speech.Config:
    return speech.Config(**{"path": "{split}.jsonl", "data_dir": str(folder), **keys})


def add_row(folder, **row) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"audio": "train/0.wav", "text": "one", "speaker": "x", **row}) + "\n")


def test_a_row_is_a_path_a_text_and_its_other_columns(folder):
    task = load_task("speech", config(folder, language="en", cluster="speaker"))
    row = task.train[0]
    assert row["prompt"] == "train/0.wav" and row["sound"] == str(folder / "train/0.wav")
    assert row["completion"] == row["text"] and row["references"] == [row["text"]]
    assert row["speaker"] == "speaker0" and row["spoken_language"] == "en"
    assert (task.sound, task.language, task.cluster, task.left_out) == ("sound", "en", "speaker", ())


def test_a_language_may_stand_in_each_row(folder):
    (folder / "train.jsonl").write_text("")
    for language in ("en", "de"):
        add_row(folder, locale=language)
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text((folder / "train.jsonl").read_text())
    assert load_task("speech", config(folder, language_column="locale")).train["spoken_language"][:] == ["en", "de"]
    with pytest.raises(TaskError, match=r"language or language_column, found both"):
        config(folder, language_column="locale", language="en")


def test_the_sound_files_are_those_that_the_rows_name(folder, tmp_path):
    named = [folder / split / f"{row}.wav" for split in ("train", "validation", "test") for row in range(4)]
    assert speech.sound_files(config(folder)) == named
    assert speech.sound_files(config(folder, max_test_examples=1)) == named[:9]
    (folder / "train/3.wav").unlink()
    assert speech.sound_files(config(folder)) == named
    sounds = {"paths": {"path": "a.wav", "text": "x"}, "arrays": {"array": [0.5, 0.1], "sampling_rate": 8000}}
    for name, sound in sounds.items():
        data = Dataset.from_list([{"audio": sound, "text": "one"}] * 2)
        DatasetDict(train=data, validation=data, test=data).save_to_disk(tmp_path / name)
        files = [Path("a.wav")] if name == "paths" else []
        assert speech.sound_files(speech.Config(path=str(tmp_path / name))) == files


def test_arrays_and_audio_columns_are_kept_as_they_are(folder, tmp_path):
    samples = tone(["one"])
    path = write_wav(tmp_path / "a.wav", samples)
    arrays = [{"audio": {"array": samples.tolist(), "sampling_rate": 8000}, "text": "one", "sound": "x"}] * 2
    files = Dataset.from_list([{"audio": str(path), "text": "one"}] * 2).cast_column("audio", Audio())
    for name, data in (("arrays", Dataset.from_list(arrays)), ("audio", files)):
        DatasetDict(train=data, validation=data, test=data).save_to_disk(tmp_path / name)
        task = load_task("speech", speech.Config(path=str(tmp_path / name)))
        assert task.train.column_names[-4:] == ["prompt", "completion", "references", "spoken_language"]
        sound = task.train[1]["sound"]
        assert sound.get("array") == samples.tolist() if name == "arrays" else sound["path"].endswith("a.wav")
        assert task.train[1]["prompt"].endswith("clip 1" if name == "arrays" else "a.wav")
    assert "data_sound" in load_task("speech", speech.Config(path=str(tmp_path / "arrays"))).train.column_names


def test_empty_texts_are_left_out_and_counted(folder):
    add_row(folder, text="  ")
    add_row(folder, text=None)
    task = load_task("speech", config(folder))
    assert len(task.train) == 4 and len(task.left_out) == 2
    assert "line 5" in task.left_out[0] and "the text is empty" in task.left_out[0]


BROKEN = {
    "missing file": ({"audio": "train/missing.wav"}, "task.audio: there is no file '.*missing.wav'"),
    "no audio": ({"audio": None}, "task.audio: the column 'audio' is null or missing"),
    "empty path": ({"audio": ""}, "task.audio: the column 'audio' is empty"),
    "no language": ({"locale": ""}, "task.language_column: the column 'locale'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_refused_or_left_out(folder, name):
    row, words = BROKEN[name]
    for split in ("train", "validation", "test"):
        lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({**line, "locale": "en"}) + "\n" for line in lines))
    add_row(folder, **{"locale": "en", **row})
    with pytest.raises(TaskError, match=words + ".*line 5"):
        load_task("speech", config(folder, language_column="locale"))
    task = load_task("speech", config(folder, language_column="locale", skip_broken_rows=True))
    assert len(task.train) == 4 and len(task.left_out) == 1 and "line 5" in task.left_out[0]


def test_columns_that_are_not_there_are_named(folder):
    for key in ("audio", "text", "language_column", "cluster"):
        with pytest.raises(TaskError, match=f"task.{key}: no column 'nothing'.*there are: audio, text, speaker"):
            load_task("speech", config(folder, **{key: "nothing"}))


def test_an_array_needs_its_rate(tmp_path):
    data = Dataset.from_list([{"audio": {"array": [0.0, 1.0]}, "text": "one"}] * 2)
    DatasetDict(train=data, validation=data, test=data).save_to_disk(tmp_path / "data")
    with pytest.raises(TaskError, match="has no sampling_rate"):
        load_task("speech", speech.Config(path=str(tmp_path / "data")))


def test_the_last_rows_are_kept_for_ppo(folder):
    task = load_task("speech", config(folder, ppo_examples=1))
    assert len(task.train) == 3 and task.ppo_prompts["prompt"][:] == ["train/3.wav"]
    assert set(" ".join(task.train["completion"]).split()) <= set(TONES)
