"""A time limit for a call in the main thread: Python code is interrupted, library code ends the process."""

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.runtime.abort import abort

GRACE_SECONDS = 5  # for code that is slow to notice, before it counts as stuck
# A function that catches the exception is interrupted again after this time; one that does not has ended by then.
AGAIN_SECONDS = 1.0


class TimedOut(BaseException):  # not an Exception, so that a function's `except Exception` does not swallow it
    """A call took longer than it may."""


@contextmanager
def time_limit(name: str, seconds: float | None) -> Iterator[None]:
    """Let a call of the reward `name` in the main thread take at most `seconds`; None sets no limit.

    A signal interrupts Python code and system calls that wait (sleep, sockets, locks), repeatedly if the function
    catches the exception. Library code that does not return to Python cannot be interrupted. After twice the time and
    `GRACE_SECONDS` a second thread ends the process with a message. Where library code lets no other thread run,
    Python's fault handler ends the process a few seconds later and shows the stack.

    Raises:
        TimedOut: the block was interrupted.
    """
    if seconds is None:
        yield
        return
    active, limit = True, 2 * seconds + GRACE_SECONDS

    def interrupt(number: int, frame: object) -> None:
        if active:
            raise TimedOut(f"did not answer within {seconds:g} s (ppo.reward_timeout)")

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
            yield
        finally:
            active = False  # if the signal comes here, the outer block still restores the timer and the handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()
