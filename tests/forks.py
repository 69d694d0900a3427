"""Children of the test process: everything is imported already, and a child may be killed."""

import faulthandler
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

LIMIT_SECONDS = 300
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def start(function: Callable[[], object]) -> int:
    """The process id of a child that runs `function`, and exits with what it returns if that is a number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        faulthandler.dump_traceback_later(LIMIT_SECONDS - 10)  # says where it hangs
        signal.alarm(LIMIT_SECONDS)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        result = function()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(function: Callable[[], object]) -> int:
    """Run `function` in a child to its end; its exit code."""
    return wait(start(function))


def at_every_change(directory: Path, act: Callable[[int], object]) -> None:
    """Call `act(1)`, `act(2)`, ... before each opening, renaming, making and removing of files in `directory`.

    Between two of them a process can be killed; what is on the disk then is what is there at one of them. It holds for
    the rest of the process.
    """
    count, acting = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, acting
        inside = event == "open" and str(arguments[0]).startswith(str(directory))
        if not acting and (inside or event in CHANGES):
            acting, count = True, count + 1
            act(count)
            acting = False

    sys.addaudithook(hook)


def photograph(directory: Path, album: Path) -> None:
    """From now on copy `directory` to `album/<number>` at every change: what a kill at that moment would leave."""
    album.mkdir()
    directory.mkdir(parents=True, exist_ok=True)
    at_every_change(directory, lambda number: shutil.copytree(directory, album / f"{number:04d}"))


def kill_at(directory: Path, number: int) -> None:
    """Kill this process before its change of that number."""
    at_every_change(directory, lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == number else None)
