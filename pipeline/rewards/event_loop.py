"""Async reward functions run together in one event loop, in a thread that stays.

The loop is the same in every step, because the connections of a client belong to the loop that opened them. A thread
of its own also works in a notebook, whose main thread has a running loop already.
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass

from pipeline.runtime.time_limit import GRACE_SECONDS, TOO_LATE, TimedOut


@dataclass(frozen=True)
class CallOutcome:
    """What came of a call: its `result`, or the `error` that it ended with."""

    result: object = None
    error: Exception | TimedOut | None = None


def is_async(function: Callable) -> bool:
    """Tell whether a function, a method, a partial or an object that can be called is `async`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def await_together(
    calls: Sequence[Callable[[], Awaitable]], seconds: float | None, meanwhile: Callable[[], object] = lambda: None
) -> list[CallOutcome]:
    """Await all calls at once, each for at most `seconds`; None sets no limit. `meanwhile` runs in this thread.

    A call that does not end when it is cancelled, or lets no other run, is left behind in its thread after twice the
    time and `GRACE_SECONDS`; a new loop takes over.
    """
    late = None if seconds is None else TimedOut(TOO_LATE.format(seconds))
    outcomes = [CallOutcome(error=late)] * len(calls)

    async def await_one(number: int, call: Callable[[], Awaitable]) -> None:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                outcomes[number] = CallOutcome(await call())
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():  # by the caller, not by the function itself
                raise
            outcomes[number] = CallOutcome(error=RuntimeError(f"cancelled itself {error}".rstrip()))
        except (Exception, SystemExit) as error:
            if not limit.expired():
                outcomes[number] = CallOutcome(
                    error=error if isinstance(error, Exception) else RuntimeError(repr(error))
                )

    async def await_all() -> None:
        await asyncio.gather(*(await_one(number, call) for number, call in enumerate(calls)))

    future = asyncio.run_coroutine_threadsafe(await_all(), _loops.current())
    try:
        meanwhile()
        if wait([future], None if seconds is None else 2 * seconds + GRACE_SECONDS).not_done:
            _loops.leave()
        else:
            future.result()
    finally:
        future.cancel()  # where the wait was interrupted, by Ctrl-C for instance
    return list(outcomes)


class _Loops:
    """The running event loop of this process; another one after a call that never came back, or after a fork."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def current(self) -> asyncio.AbstractEventLoop:
        """Return a loop that runs."""
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="async rewards", daemon=True)
            self._thread.start()
        return self._loop

    def leave(self) -> None:
        """Use another loop from now on."""
        self._loop = None


_loops = _Loops()
