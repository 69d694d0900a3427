"""Run a function in two or more processes of one gloo group, on the CPU."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

SECONDS = 180


def run_in_two(function: Callable[[], None], errors: Path) -> None:
    """Call `function` in two processes: `run_in_processes`."""
    run_in_processes(2, function, errors)


def run_in_processes(count: int, function: Callable[[], None], errors: Path) -> None:
    """Call `function` in `count` forked processes, which `Accelerator()` will find to be ranks 0, 1, ...

    Forked, because importing the libraries takes longer than the tests.

    Raises:
        RuntimeError: a process failed or did not end; the message holds its traceback.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(function, rank, count, port, errors)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if codes != [0] * count:
        said = "\n".join(path.read_text() for path in sorted(errors.glob("error-*")))
        raise RuntimeError(f"exit codes {codes} after at most {SECONDS} s each\n{said}")


def _rank(function: Callable[[], None], rank: int, count: int, port: int, errors: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        function()
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    except BaseException:
        (errors / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # at once: the other process may wait for this one
