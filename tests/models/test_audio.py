"""Sound is read as samples of one channel at the rate of a model, and what is none is refused in a few words."""

import sys

import numpy as np
import pytest
from scipy.io import wavfile
from speech_toys import tone, write_wav

from pipeline.models.audio import UnusableSound, read_samples

WORDS = ["one", "three"]


def test_a_file_its_bytes_and_an_array_are_the_same_sound(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(WORDS))
    from_file = read_samples(str(path), 8000)
    assert np.array_equal(read_samples({"bytes": path.read_bytes(), "path": "a.wav"}, 8000), from_file)
    assert np.array_equal(read_samples({"bytes": None, "path": str(path)}, 8000), from_file)
    array = {"array": from_file.tolist(), "sampling_rate": 8000}
    assert np.array_equal(read_samples(array, 8000), from_file)
    np.testing.assert_allclose(from_file, tone(WORDS), atol=1e-4)


def test_resampling_keeps_the_tone(tmp_path):
    for rate in (8000, 11025, 44100):
        samples = read_samples(str(write_wav(tmp_path / "a.wav", tone(["four"], rate, 1.0), rate)), 16000)
        assert abs(len(samples) - 16000 * 1.05) <= 1
        spectrum = np.abs(np.fft.rfft(samples[:16000]))
        assert spectrum.argmax() == 1300  # bins of 1 Hz


def test_channels_are_mixed_and_every_width_has_the_same_scale(tmp_path):
    samples = tone(WORDS)
    stereo = np.stack([samples, np.zeros_like(samples)], 1)
    for dtype, scale in ((np.int16, 2**15), (np.int32, 2**31), (np.float32, 1)):
        wavfile.write(tmp_path / "a.wav", 8000, (stereo * scale).astype(dtype))
        np.testing.assert_allclose(read_samples(str(tmp_path / "a.wav"), 8000), samples / 2, atol=1e-4)
    wavfile.write(tmp_path / "a.wav", 8000, (samples * 127 + 128).astype(np.uint8))
    np.testing.assert_allclose(read_samples(str(tmp_path / "a.wav"), 8000), samples, atol=0.02)
    array = {"array": stereo.T, "sampling_rate": 8000}
    np.testing.assert_allclose(read_samples(array, 8000), samples / 2, atol=1e-6)


def broken(tmp_path):
    good = write_wav(tmp_path / "good.wav", tone(WORDS)).read_bytes()
    header = bytearray(good)
    header[24:28], header[28:32] = (7).to_bytes(4, "little"), (14).to_bytes(4, "little")  # Hz, bytes a second
    return {
        "cannot be opened": str(tmp_path / "missing.wav"),
        "is empty": {"bytes": b"", "path": "a.wav"},
        "cannot be decoded": {"bytes": good[:30], "path": "a.wav"},
        "sampling rate 7": {"bytes": bytes(header), "path": "a.wav"},
        "is silent": {"array": np.zeros(100), "sampling_rate": 8000},
        "not finite": {"array": [0.0, float("nan"), 1.0], "sampling_rate": 8000},
        "has no samples": {"array": [], "sampling_rate": 8000},
        "rate None": {"array": [0.0, 1.0], "sampling_rate": None},
        "no array of numbers": {"array": ["a"], "sampling_rate": 8000},
        "3 dimensions": {"array": np.ones((2, 2, 2)), "sampling_rate": 8000},
    }


def test_unusable_sound_is_refused(tmp_path):
    for words, sound in broken(tmp_path).items():
        with pytest.raises(UnusableSound, match=words):
            read_samples(sound, 8000)


def test_other_formats_need_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(40))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UnusableSound, match="its extra `speech`"):
        read_samples(str(tmp_path / "a.flac"), 8000)


def test_soundfile_reads_other_formats(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", tone(WORDS), 8000)
    np.testing.assert_allclose(read_samples(str(tmp_path / "a.flac"), 8000), tone(WORDS), atol=1e-4)
    (tmp_path / "b.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:20])
    with pytest.raises(UnusableSound, match="cannot be decoded"):
        read_samples(str(tmp_path / "b.flac"), 8000)
