"""Make the data of digits_whisper.yaml from single spoken digits: `python recipes/digit_strings.py RECORDINGS FOLDER`.

RECORDINGS is the folder `recordings` of the Free Spoken Digit Dataset (CC BY-SA 4.0),
https://github.com/Jakobovski/free-spoken-digit-dataset: WAV files DIGIT_SPEAKER_TAKE.wav, 8 kHz, mono, 16 bits. A clip
is a string of two to five digits of one speaker, with 0.05 to 0.25 s of silence after each. Test clips have takes 0 to
4, which is the test split of the data set, validation clips 5 to 9, and training clips the others. FOLDER gets
{train,validation,test}.jsonl with `audio`, `text` and `speaker`, and the clips.
"""

import argparse
import json
import random
import sys
import wave
from collections.abc import Sequence
from pathlib import Path

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE, SAMPLE_BYTES = 8000, 2
TAKES = {"train": range(10, 50), "validation": range(5, 10), "test": range(5)}


def read_digit(file: Path) -> bytes:
    """Read the samples of a digit.

    Raises:
        ValueError: it is missing, or has another rate, width or number of channels.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: RECORDINGS is not whole")
    with wave.open(str(file)) as sound:
        if (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) != (RATE, SAMPLE_BYTES, 1):
            raise ValueError(f"{file} is not at 8 kHz with one channel of 16 bits")
        return sound.readframes(sound.getnframes())


def write_clip(file: Path, samples: bytes) -> None:
    """Write samples as a WAV file."""
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(SAMPLE_BYTES)
        sound.setframerate(RATE)
        sound.writeframes(samples)


def write_split(recordings: Path, folder: Path, split: str, count: int, seed: int) -> None:
    """Write `count` clips of a split and their table; the draws depend on seed and split alone."""
    speakers = sorted({file.stem.split("_")[1] for file in recordings.glob("*_*_*.wav")})
    if not speakers:
        raise ValueError(f"{recordings} has no files DIGIT_SPEAKER_TAKE.wav")
    draw, rows = random.Random(f"{seed}-{split}"), []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        speaker = draw.choice(speakers)
        digits = [draw.randrange(10) for _ in range(draw.randint(2, 5))]
        samples = b""
        for digit in digits:
            samples += read_digit(recordings / f"{digit}_{speaker}_{draw.choice(TAKES[split])}.wav")
            samples += bytes(SAMPLE_BYTES * int(RATE * draw.uniform(0.05, 0.25)))
        name = f"{split}/{number:05d}.wav"
        write_clip(folder / name, samples)
        rows.append({"audio": name, "text": " ".join(WORDS[digit] for digit in digits), "speaker": speaker})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Write all splits; return 0, or 1 with one sentence where the recordings cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", metavar="RECORDINGS", type=Path)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="training clips")
    parser.add_argument("--validation", type=int, default=200, help="validation clips")
    parser.add_argument("--test", type=int, default=300, help="test clips")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for split in TAKES:
            write_split(args.recordings, args.folder, split, getattr(args, split), args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
