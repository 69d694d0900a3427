"""How long a piece of the main thread may take: Python code is interrupted, what cannot be ends the process."""

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.runtime.abort import give_up

GRACE_SECONDS = 5  # for code that is slow to notice, before it counts as stuck
# Until a function that carries on is interrupted again: time enough for the exception to leave one that does not.
AGAIN_SECONDS = 1.0


class TimedOut(BaseException):  # not an Exception: a function that goes on after any of these must not swallow it
    """A call took longer than it may."""


@contextmanager
def time_limit(name: str, seconds: float | None) -> Iterator[None]:
    """Let a call of the reward `name`, in the main thread, take at most `seconds`; None is any number.

    A signal interrupts Python code and waits of the system (sleeping, sockets, locks), again and again where a
    function carries on. Library code that does not return to Python cannot be interrupted, so it cannot be skipped
    either: after twice the time and `GRACE_SECONDS` a second thread ends the process with a sentence, or, where
    library code lets no other thread run, Python's fault handler ends it and shows the stack, a few seconds later.

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
    watch = threading.Timer(limit, give_up, [stuck])
    watch.daemon = True
    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, AGAIN_SECONDS))
    watch.start()
    faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True)
    try:
        try:
            yield
        finally:
            active = False  # interrupted here, the outer block still sets everything back
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()
