"""Ending a training run on a signal: after the step at hand and a checkpoint, all processes together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather

_received: list[int] = []


class Stopped(Exception):  # not an error: a run that was told to stop did so
    """Training stopped after a checkpoint because of signal `number`."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after the checkpoint of step {step}; the same command continues"
        )
        self.exit_code = 128 + number


@contextmanager
def stop_signals() -> Iterator[None]:
    """Within the block SIGTERM or Ctrl-C makes a trainer save after its step; a second Ctrl-C aborts at once."""
    _received.clear()
    before = {number: signal.signal(number, _ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _ask(number: int, frame: object) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        raise KeyboardInterrupt
    _received.append(number)
    if PartialState().is_main_process:
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C again stops without one\n")


def requested_stop() -> int | None:
    """The number of the signal that any process received; every process calls it and all get the same."""
    number, processes = _received[0] if _received else 0, PartialState()
    if processes.num_processes > 1:
        number = int(gather(torch.tensor([number], device=processes.device)).max())
    return number or None
