"""Notices that a run no longer gets on, says which process is stuck and in what, and ends it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState

from pipeline.runtime.abort import give_up

VARIABLE, DEFAULT_MINUTES = "RELAY_TIMEOUT_MINUTES", 30.0
PREFIX = ".phase-"
REFRESH_SECONDS = 1.0  # a phase that goes on is written down no more often


def timeout_minutes() -> float:
    """How long a process may wait for another one, or stay in one phase of a step, in minutes.

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
    """Where the main thread of this process is, and since when; written down where others are to know."""

    def __init__(self) -> None:
        self.phase, self.since, self.written = "the start", time.monotonic(), 0.0
        self.count = 0  # of phases: all processes go through the same ones
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
    """The main thread begins something, or gets on with it: `the rewards of PPO step 3`."""
    _progress.enter(phase)


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Within the block this process ends where none of its calls of `enter` came for `timeout_minutes`.

    Alone it is only watched where the variable is set: there is nobody who waits. Each of several processes leaves its
    phase in `directory`, so that the one that notices can name the one that came to a stop first.
    """
    processes = PartialState()
    alone = processes.num_processes == 1
    if alone and VARIABLE not in os.environ:
        yield
        return
    if not alone:
        directory.mkdir(parents=True, exist_ok=True)
        _progress.file = directory / f"{PREFIX}{processes.process_index}"
        _progress.count = 0
    enter("the first step")
    over = threading.Event()
    arguments = (over, 60 * timeout_minutes(), directory, processes.process_index, processes.num_processes)
    threading.Thread(target=_watch, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if _progress.file:
            _progress.file.unlink(missing_ok=True)
        _progress.file = None


def _watch(over: threading.Event, seconds: float, directory: Path, own: int, count: int) -> None:
    while not over.wait(min(1.0, seconds / 10)):
        if time.monotonic() - _progress.since > seconds:
            give_up(_sentence(seconds, directory, own, count))


def _sentence(seconds: float, directory: Path, own: int, count: int) -> str:
    """Who is furthest behind, or came to a stop first, by the notes of all processes that can be seen from here."""
    found = {own: (_progress.count, time.time() - (time.monotonic() - _progress.since), _progress.phase)}
    for rank in range(count):
        with suppress(OSError, ValueError):
            file = directory / f"{PREFIX}{rank}"
            number, phase = file.read_text(encoding="utf-8").split(" ", 1)
            found.setdefault(rank, (int(number), file.stat().st_mtime, phase))
    stuck = min(found, key=lambda rank: found[rank][:2])
    waits = "" if stuck == own else f", and process {own} waits for it in {found[own][2]}"
    return (
        f"process {stuck} of {count} has not got on for {seconds / 60:g} minutes ({VARIABLE}): it is in "
        f"{found[stuck][2]}{waits}; the last checkpoint is intact: the same command continues from there"
    )
