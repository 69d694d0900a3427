"""The end of a process that cannot go on: its last words, for people and for the launcher, and its exit code."""

import json
import os
import time

EXIT_CODE = 1


def record_failure(sentence: str, consequence: bool = False) -> None:
    """Leave the cause for the launcher, where there is one: torch's elastic agent names a file for it.

    `consequence`: this process only noticed that another one was gone. `seconds` orders failures of the same second.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        now = time.time()
        extra = {"py_callstack": sentence, "timestamp": str(int(now)), "seconds": now, "consequence": consequence}
        with open(file, "w", encoding="utf-8") as record:
            json.dump({"message": {"message": sentence, "extraInfo": extra}}, record)


def give_up(sentence: str) -> None:
    """End the process at once, from any thread, whatever its main thread is doing."""
    os.write(2, f"\nerror: {sentence}\n".encode())
    record_failure(sentence)
    os._exit(EXIT_CODE)
