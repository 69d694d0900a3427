"""A time limit for a call: in the main thread the call is interrupted, elsewhere it is left behind in a thread."""

import contextvars
import faulthandler
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from pipeline.runtime.abort import abort

GRACE_SECONDS = 5  # for code that is slow to notice, before it counts as stuck
# A function that catches the exception is interrupted again after this time; one that does not has ended by then.
AGAIN_SECONDS = 1.0


TOO_LATE = "did not answer within {:g} s (ppo.reward_timeout)"
T = TypeVar("T")


class TimedOut(BaseException):  # not an Exception, so that a function's `except Exception` does not swallow it
    """A call took longer than it may."""


def call_within(name: str, seconds: float | None, function: Callable[[], T]) -> T:
    """Call the reward `name`, which may take at most `seconds`; None sets no limit.

    Signals reach the main thread alone, and some systems have no SIGALRM. There the call runs in a thread of its own.
    One that takes too long is not waited for, and ends with the process.

    Raises:
        TimedOut: the call took too long.
    """
    if seconds is None:
        return function()
    if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
        with time_limit(name, seconds):
            return function()
    return _call_in_thread(seconds, function)


def _call_in_thread(seconds: float, function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []
    gradients, context = torch.is_grad_enabled(), contextvars.copy_context()

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients):  # a setting of each thread
                results.append(context.run(function))
        except BaseException as error:  # the caller raises it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimedOut(TOO_LATE.format(seconds))
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def time_limit(name: str, seconds: float) -> Iterator[None]:
    """Let a call of the reward `name` in the main thread take at most `seconds`.

    A signal interrupts Python code and system calls that wait (sleep, sockets, locks), repeatedly if the function
    catches the exception. Library code that does not return to Python cannot be interrupted. After twice the time and
    `GRACE_SECONDS` a second thread ends the process with a message. Where library code lets no other thread run,
    Python's fault handler ends the process a few seconds later and shows the stack.

    Raises:
        TimedOut: the block was interrupted.
    """
    active, limit = False, 2 * seconds + GRACE_SECONDS

    def interrupt(number: int, frame: object) -> None:
        if active:
            raise TimedOut(TOO_LATE.format(seconds))

    stuck = (
        f"reward {name!r} did not answer within {seconds:g} s (ppo.reward_timeout) and could not be interrupted, "
        "because it is stuck in library code; the last checkpoint is intact: mend the function, then run again"
    )
    watch = threading.Timer(limit, abort, [stuck])
    watch.daemon = True
    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, AGAIN_SECONDS))
    watch.start()
    faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True)
    try:
        try:
            active = True  # a signal before it is ignored, and comes again
            yield
        finally:
            active = False  # if the signal comes here, the outer block still restores the timer and the handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()
