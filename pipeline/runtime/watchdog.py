"""A watchdog: it notices that a run hangs, names the process that is stuck and its phase, and ends the run."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState

from pipeline.runtime.abort import abort

VARIABLE, DEFAULT_MINUTES = "RELAY_TIMEOUT_MINUTES", 30.0
PREFIX = ".phase-"
REFRESH_SECONDS = 1.0  # the least time between two notes of the same phase


def timeout_minutes() -> float:
    """Return how many minutes a process may wait for another one, or stay in one phase of a step.

    Raises:
        ValueError: the variable is no number above 0.
    """
    text = os.environ.get(VARIABLE, str(DEFAULT_MINUTES))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"{VARIABLE}: expected a number of minutes above 0, found {text!r}")
    return minutes


class _Progress:
    """The phase that the main thread of this process is in, and since when; in a file for the other processes."""

    def __init__(self) -> None:
        self.phase, self.since, self.written = "the start", time.monotonic(), 0.0
        self.count = 0  # of phases so far; all processes go through the same phases
        self.file: Path | None = None

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        self.count += phase != self.phase
        if self.file and (phase != self.phase or now - self.written > REFRESH_SECONDS):
            self.file.write_text(f"{self.count} {phase}", encoding="utf-8")
            self.written = now
        self.phase, self.since = phase, now


_progress = _Progress()


def enter(phase: str) -> None:
    """Note that the main thread begins a phase, or makes progress in it: `the rewards of PPO step 3`."""
    _progress.enter(phase)


def make_progress() -> None:
    """Note that the main thread gets on in the phase that it is in."""
    _progress.enter(_progress.phase)


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """End this process if the block makes no call of `enter` for `timeout_minutes`.

    A single process is watched only if RELAY_TIMEOUT_MINUTES is set. Each of several processes writes its phase into
    `directory`, so that the process that notices the hang can name the process that hung first.
    """
    state = PartialState()
    alone = state.num_processes == 1
    if alone and VARIABLE not in os.environ:
        yield
        return
    if not alone:
        directory.mkdir(parents=True, exist_ok=True)
        _progress.file = directory / f"{PREFIX}{state.process_index}"
        _progress.count = 0
    enter("the first step")
    over = threading.Event()
    arguments = (over, 60 * timeout_minutes(), directory, state.process_index, state.num_processes)
    threading.Thread(target=_watch, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if _progress.file:
            _progress.file.unlink(missing_ok=True)
        _progress.file = None


def _watch(over: threading.Event, seconds: float, directory: Path, rank: int, count: int) -> None:
    while not over.wait(min(1.0, seconds / 10)):
        if time.monotonic() - _progress.since > seconds:
            abort(_sentence(seconds, directory, rank, count))


def _sentence(seconds: float, directory: Path, rank: int, count: int) -> str:
    """Name the process that has made the fewest phases, or of equal ones the first that hung, by the notes of all."""
    since = time.time() - (time.monotonic() - _progress.since)
    notes = {rank: (_progress.count, since, _progress.phase)}
    for other in range(count):
        with suppress(OSError, ValueError):
            file = directory / f"{PREFIX}{other}"
            number, phase = file.read_text(encoding="utf-8").split(" ", 1)
            notes.setdefault(other, (int(number), file.stat().st_mtime, phase))
    stuck = min(notes, key=lambda other: notes[other][:2])
    waits = "" if stuck == rank else f", and process {rank} waits for it in {notes[rank][2]}"
    return (
        f"process {stuck} of {count} has not got on for {seconds / 60:g} minutes ({VARIABLE}): it is in "
        f"{notes[stuck][2]}{waits}; the last checkpoint is intact: the same command continues from there"
    )
