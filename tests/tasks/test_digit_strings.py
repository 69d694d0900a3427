"""The script that makes the data of digits_whisper.yaml, over recordings whose samples say which they are."""

import importlib.util
import json
import wave
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "recipes" / "digit_strings.py"
spec = importlib.util.spec_from_file_location("digit_strings", FILE)
digit_strings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digit_strings)

SIZES = ["--train", "12", "--validation", "4", "--test", "4"]


@pytest.fixture
def recordings(tmp_path) -> Path:
    """One sample each: 100 times the speaker's number, the take, and the digit and 1 in the upper byte."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for speaker, name in enumerate(("ann", "bob")):
        for digit in range(10):
            for take in range(50):
                file = folder / f"{digit}_{name}_{take}.wav"
                digit_strings.write_clip(file, bytes([100 * speaker + take, digit + 1]))
    return folder


def heard(file: Path) -> tuple[str, set[int], set[int]]:
    """The digits, takes and speakers in a clip."""
    with wave.open(str(file)) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (8000, 1)
        samples = sound.readframes(sound.getnframes())
    spoken = [(low, high - 1) for low, high in zip(samples[::2], samples[1::2], strict=True) if high]
    assert 400 * len(spoken) <= len(samples) // 2 - len(spoken) <= 2000 * len(spoken)  # 0.05 to 0.25 s after each
    words = " ".join(digit_strings.WORDS[digit] for _, digit in spoken)
    return words, {low % 100 for low, _ in spoken}, {low // 100 for low, _ in spoken}


def test_clips_say_what_their_table_says_and_splits_share_no_take(recordings, tmp_path):
    for folder in ("first", "second"):
        assert digit_strings.main([str(recordings), str(tmp_path / folder), *SIZES]) == 0
    for split, count, takes in (("train", 12, range(10, 50)), ("validation", 4, range(5, 10)), ("test", 4, range(5))):
        table = (tmp_path / "first" / f"{split}.jsonl").read_text()
        rows = [json.loads(line) for line in table.splitlines()]
        assert len(rows) == count and all(2 <= len(row["text"].split()) <= 5 for row in rows)
        for row in rows:
            words, used, speakers = heard(tmp_path / "first" / row["audio"])
            assert words == row["text"] and used <= set(takes)
            assert speakers == {("ann", "bob").index(row["speaker"])}
            assert (tmp_path / "second" / row["audio"]).read_bytes() == (
                tmp_path / "first" / row["audio"]
            ).read_bytes()


@pytest.mark.parametrize("case", ["empty", "missing", "rate"])
def test_recordings_that_cannot_be_used_are_named(case, recordings, tmp_path, capsys):
    if case == "rate":
        for file in recordings.glob("*.wav"):
            with wave.open(str(file), "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(16000)
    elif case == "missing":
        for file in recordings.glob("[1-9]_*.wav"):
            file.unlink()
    source = tmp_path if case == "empty" else recordings
    assert digit_strings.main([str(source), str(tmp_path / "out"), *SIZES]) == 1
    words = {"empty": "has no files DIGIT_SPEAKER_TAKE.wav", "missing": "is missing", "rate": "is not at 8 kHz"}
    assert words[case] in capsys.readouterr().err
