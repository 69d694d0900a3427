"""SIGTERM and Ctrl-C end a training run after the current step and a checkpoint, in all processes together."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather

_received: list[int] = []


class Stopped(Exception):  # not an error: the run was told to stop
    """Training stopped after a checkpoint because of signal `number`."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after the checkpoint of step {step}; the same command continues"
        )
        self.exit_code = 128 + number


@contextmanager
def stop_signals() -> Iterator[None]:
    """Make SIGTERM or Ctrl-C stop a trainer after its step and a checkpoint; a second Ctrl-C aborts at once."""
    _received.clear()
    try:
        with handled(dict.fromkeys((signal.SIGTERM, signal.SIGINT), _request_stop)):
            yield
    finally:
        _received.clear()


@contextmanager
def handled(handlers: Mapping[int, object]) -> Iterator[None]:
    """Install signal handlers for the time of a block; a signal that is ignored, as under nohup, stays ignored."""
    heard = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _request_stop(number: int, frame: object) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        raise KeyboardInterrupt
    _received.append(number)
    if PartialState().is_main_process:
        # Not print: the signal may have interrupted a print.
        os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C again stops without one\n")


def requested_stop() -> int | None:
    """Return the number of a signal that any process received, the same on all; every process calls it."""
    number, state = _received[0] if _received else 0, PartialState()
    if state.num_processes > 1:
        number = int(gather(torch.tensor([number], device=state.device)).max())
    return number or None
