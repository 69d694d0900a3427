"""The end of a process that cannot go on: its last message, for people and for the launcher, and its exit code."""

import json
import os
import time
from pathlib import Path

from pipeline.runtime.files import write_atomically

EXIT_CODE = 1


def record_failure(message: str, consequence: bool = False) -> None:
    """Write the cause of a failure for the launcher, into the file that torch's elastic agent names.

    `consequence` says that this process only noticed that another one was gone. `seconds` orders failures of the same
    second.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        now = time.time()
        extra = {"py_callstack": message, "timestamp": str(int(now)), "seconds": now, "consequence": consequence}
        # The launcher may end this process while it writes, and half a record would end the launcher.
        write_atomically(Path(file), json.dumps({"message": {"message": message, "extraInfo": extra}}))


def abort(message: str) -> None:
    """Print a message and end the process at once, from any thread, whatever its main thread is doing."""
    os.write(2, f"\nerror: {message}\n".encode())
    record_failure(message)
    os._exit(EXIT_CODE)
