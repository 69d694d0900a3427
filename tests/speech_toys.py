"""Spoken numbers without a recording: a tone for each word, as WAV files and rows of a data set."""

import json
import random
import wave
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PretrainedConfig

from pipeline.models.clips import hear
from pipeline.tasks import load_task, speech

TONES = {"one": 300, "two": 500, "three": 800, "four": 1300, "five": 2100}  # Hz
RATE = 8000


def tone(words: list[str], rate: int = RATE, seconds: float = 0.12) -> np.ndarray:
    """Return samples in which each word is a tone, with a pause after it."""
    time = np.arange(int(rate * seconds)) / rate
    pause = np.zeros(int(rate * 0.05))
    return np.concatenate([part for word in words for part in (0.5 * np.sin(2 * np.pi * TONES[word] * time), pause)])


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """Write samples between -1 and 1 as 16-bit mono."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def write_data(folder: Path, **counts: int) -> Path:
    """Write clips of one to three words and their rows, {train,validation,test}.jsonl."""
    chance = random.Random(0)
    for split in ("train", "validation", "test"):
        rows = []
        for number in range(counts.get(split, 4)):
            words = chance.choices(list(TONES), k=chance.randint(1, 3))
            write_wav(folder / split / f"{number}.wav", tone(words))
            speaker = f"speaker{number % 2}"
            rows.append({"audio": f"{split}/{number}.wav", "text": " ".join(words), "speaker": speaker})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spoken_examples(folder: Path, config: PretrainedConfig, count: int, language: str | None = "en") -> Dataset:
    """Make `count` rows with prompt, completion, references, speaker and the clip that a model hears."""
    task = load_task("speech", speech.Config("{split}.jsonl", str(write_data(folder, train=count)), language=language))
    rows = task.train.remove_columns(["spoken_language", "audio", "text"])
    return hear(rows, "sound", config, language, folder / "features")
