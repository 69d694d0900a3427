"""Work on rows that processes share out: each writes what it made to a file, and the main one reads all of them.

No text travels over the process group. The files are in a directory that all processes see, as a run directory is.
"""

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")
PATIENCE = 20.0  # seconds in which a file that another machine has closed must be visible here


class Parts:
    """The part files of one piece of work: JSON lines, a file for each process and name."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state = directory, PartialState()

    @property
    def is_read_here(self) -> bool:
        """Whether this is the process that reads the parts."""
        return self.state.is_main_process

    def own(self, blocks: Sequence[T]) -> Sequence[T]:
        """This process's share of the blocks: every n-th one, so that blocks are the same for any number n."""
        return blocks[self.state.process_index :: self.state.num_processes]

    def write(self, name: str, items: Iterable[tuple[int, object]]) -> None:
        """Write what this process made, each item of JSON with the number it is ordered by."""
        file = self._file(name, self.state.process_index)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            # Escaped, because a model may write halves of letters that no file can hold.
            lines.writelines(f"{json.dumps([index, item])}\n" for index, item in items)

    def wait(self) -> None:
        """Until every process has written."""
        self.state.wait_for_everyone()

    def read(self, name: str) -> list:
        """What all processes wrote under a name, in order of the numbers; equal numbers stay as they were written.

        Raises:
            OSError: the file of a process is not to be seen.
        """
        found: list[tuple[int, object]] = []
        for rank in range(self.state.num_processes):
            file = self._file(name, rank)
            if not _is_visible(file):
                raise OSError(
                    f"{file}, which process {rank} has written, is not to be seen: output_dir must be on a file "
                    "system that all machines share"
                )
            with file.open(encoding="utf-8") as lines:
                found += map(json.loads, lines)
        return [item for _, item in sorted(found, key=lambda line: line[0])]

    def shared_out(
        self, name: str, blocks: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[object]]
    ) -> list:
        """What `work` makes of each row of the blocks, in order of the rows, on the main process; [] on the others.

        `work` gets a block of row numbers and gives an item of JSON for each. Every process calls this.
        """
        self.write(name, (line for block in self.own(blocks) for line in zip(block, work(list(block)), strict=True)))
        self.wait()
        return self.read(name) if self.is_read_here else []

    def _file(self, name: str, rank: int) -> Path:
        return self.directory / f"{name}.{rank}.jsonl"


def unseen(directory: Path) -> str | None:
    """Why the processes do not share a directory, in a sentence, on every process; None if they do.

    The main process leaves a mark that nobody can have made before, and takes it away when all have looked. The
    directory is made if need be, and taken away again.

    Raises:
        ValueError, OSError: as `on_main`, where the main process cannot write there.
    """
    state = PartialState()
    if state.num_processes == 1:
        return None
    before = directory.is_dir()
    mark = directory / on_main(lambda: _leave_mark(directory))
    sees = _is_visible(mark)
    looked = gather_object([(sees, state.process_index, socket.gethostname(), str(directory.absolute()))])
    if state.is_main_process:
        mark.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something by now
            if not before:
                directory.rmdir()
    state.wait_for_everyone()  # nobody makes or looks at it meanwhile
    (_, _, home, place), *others = looked
    for seen, rank, host, path in others:
        if not seen:
            there = "" if path == place else f", whose own is {path},"
            return (
                f"process {rank} on {host}{there} does not see what process 0 on {home} writes to {place}: output_dir "
                "must be on a file system that all machines share"
            )
    return None


def _leave_mark(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / f".mark-{secrets.token_hex(8)}"
    mark.touch()
    return mark.name


def _is_visible(file: Path) -> bool:
    """Whether a file is there; a file system of several machines may show it late."""
    deadline = time.monotonic() + PATIENCE
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(file.parent)  # asks the server of a network file system again
        time.sleep(0.05)
    return True


@contextmanager
def part_files(directory: Path) -> Iterator[Parts]:
    """Part files in `directory`, which is empty at first and gone at the end. Every process enters it."""
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(directory, ignore_errors=True)  # left by a run that was killed
    state.wait_for_everyone()
    yield Parts(directory)
    if state.is_main_process:  # which has read them, so that all have written
        shutil.rmtree(directory, ignore_errors=True)


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives on the main process, on every process: a few numbers, sent over the process group.

    Raises:
        ValueError, OSError, FloatingPointError: those of the main process there; with the same words as a ValueError
            on the others.
    """
    said: list[object] = [None, None]
    if PartialState().is_main_process:
        try:
            said = [function(), None]
        except (ValueError, OSError, FloatingPointError) as error:
            broadcast_object_list([None, str(error)])
            raise
    result, problem = broadcast_object_list(said)
    if problem is not None:
        raise ValueError(problem)
    return result
