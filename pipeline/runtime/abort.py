"""The end of a process that cannot go on: its last message, for people and for the launcher, and its exit code."""

import json
import os
import time

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
        with open(file, "w", encoding="utf-8") as record:
            json.dump({"message": {"message": message, "extraInfo": extra}}, record)


def abort(message: str) -> None:
    """Print a message and end the process at once, from any thread, whatever its main thread is doing."""
    os.write(2, f"\nerror: {message}\n".encode())
    record_failure(message)
    os._exit(EXIT_CODE)
