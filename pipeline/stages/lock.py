"""A lock that lets one run at a time work in a run directory."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

LOCK = ".lock"


class RunInUseError(Exception):
    """Another process is at work in the run directory."""


@contextmanager
def run_lock(directory: Path) -> Iterator[str | None]:
    """Hold a run directory during a block, which gets the name of the last holder if that one did not release it.

    The operating system releases the lock of a process that dies, so a stale lock is free. The file `.lock` names the
    holder.

    Raises:
        RunInUseError: another process holds it, naming host, process and start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        file.seek(0)
        holder = file.read().strip()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInUseError(
                f"{directory} is in use by {holder or 'another run'}; wait until it ends, or choose another name"
            ) from error
        except OSError as error:
            raise OSError(
                f"the file system of {directory} has no file locks ({error.strerror}); mount it with them (Lustre: "
                "flock), or choose another output_dir"
            ) from error
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        try:
            yield holder or None
        finally:
            file.truncate(0)
