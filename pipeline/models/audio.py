"""Sound as samples: files, bytes and arrays, mixed to one channel and resampled to the rate of a model."""

import io
from collections.abc import Mapping
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly

RATES = range(1_000, 768_001)  # Hz; a header with another one is damaged
SILENCE = 2 / 2**15  # between the loudest and the quietest sample: the last bit of 16
Samples = NDArray[np.float32]


class UnusableSound(ValueError):
    """A clip gives no samples; the message says why, in words that follow its name."""


def read_samples(sound: str | Mapping[str, object], rate: int) -> Samples:
    """Read a clip as samples between -1 and 1 of one channel at `rate` Hz.

    `sound` is the path of a file, a mapping with its `bytes`, or one with an `array` and its `sampling_rate`. WAV
    files are read by SciPy, other formats by soundfile (the extra `speech`).

    Raises:
        UnusableSound: no such file, a damaged one or one of an unknown format, an impossible rate, numbers that are
            not finite, no samples, or silence.
    """
    is_array = isinstance(sound, Mapping) and sound.get("array") is not None
    samples, file_rate = _read_array(sound) if is_array else _read(sound)
    if isinstance(file_rate, bool) or not isinstance(file_rate, int) or file_rate not in RATES:
        raise UnusableSound(f"has the sampling rate {file_rate!r}, expected {RATES.start} to {RATES.stop - 1} Hz")
    if samples.ndim > 2 or not samples.size:
        raise UnusableSound("has no samples" if not samples.size else f"has {samples.ndim} dimensions, expected 1")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise UnusableSound("has samples that are not finite (NaN or infinity)")
    if np.ptp(mono) <= SILENCE:
        raise UnusableSound("is silent: all its samples are equal")
    if file_rate == rate:
        return mono
    divisor = gcd(file_rate, rate)
    return resample_poly(mono, rate // divisor, file_rate // divisor).astype(np.float32)


def _read_array(sound: Mapping[str, object]) -> tuple[Samples, object]:
    try:
        samples = np.asarray(sound["array"], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UnusableSound(f"holds no array of numbers ({error})") from error
    # An array of several channels has them first, as `datasets` gives them.
    return samples.T if samples.ndim == 2 else samples, sound.get("sampling_rate")


def _read(sound: str | Mapping[str, object]) -> tuple[Samples, int]:
    """Read a file, or the bytes of one."""
    path = sound if isinstance(sound, str) else sound.get("path")
    data = None if isinstance(sound, str) else sound.get("bytes")
    if data is None:
        try:
            data = Path(str(path)).expanduser().read_bytes()
        except OSError as error:
            raise UnusableSound(f"cannot be opened ({error.strerror or error})") from error
    if not data:
        raise UnusableSound("is empty")
    try:
        return _decode_wav(data) if data[:4] == b"RIFF" else _decode_by_soundfile(data)
    except ImportError as error:
        raise UnusableSound(
            "is no WAV file, and other formats need soundfile, which is not installed; install Relay with its extra "
            "`speech`"
        ) from error
    except UnusableSound:
        raise
    except Exception as error:  # a damaged file gives rise to errors of many kinds
        raise UnusableSound(f"cannot be decoded ({' '.join(str(error).split())[:200].rstrip('.')})") from error


def _decode_wav(data: bytes) -> tuple[Samples, int]:
    rate, samples = wavfile.read(io.BytesIO(data))
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128, rate
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / (np.iinfo(samples.dtype).max + 1), rate
    return samples.astype(np.float32), rate


def _decode_by_soundfile(data: bytes) -> tuple[Samples, int]:
    import soundfile  # an extra

    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return samples, rate
