"""What run.py starts for a stage: accelerate launch, and the first failure of its processes in one sentence."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

CAUSE_FILE = "RELAY_CAUSE_FILE"  # names the file in which run.py looks for the cause
ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # what the agent does to the others once one has failed


def main(argv: Sequence[str]) -> int:
    """Launch with the arguments of `accelerate launch`; the exit code of the first process that failed."""
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        tell(cause(rank, failure))
        return exit_code(failure.exitcode)
    except subprocess.CalledProcessError as error:  # one process, which has said why if it could
        return exit_code(error.returncode)
    return 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The process that failed first: not one that only lost it, nor one that was ended for its sake."""

    def order(rank: int) -> tuple[bool, bool, float]:
        failure, noted = failures[rank], _noted(failures[rank])
        return bool(noted.get("consequence")), failure.exitcode in ENDED, noted.get("seconds", failure.timestamp)

    rank = min(failures, key=order)
    return rank, failures[rank]


def cause(rank: int, failure: ProcessFailure) -> str:
    """What a process failed of: its own last words, or its exit code."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"process {rank} was ended by {name}{hint}"
    noted = _noted(failure)
    if "seconds" not in noted:  # of this program alone the words are one sentence
        return f"process {rank} failed with exit code {failure.exitcode}"
    words = noted["py_callstack"]
    return words if words.startswith("process ") else f"process {rank} failed: {words}"


def _noted(failure: ProcessFailure) -> dict:
    message = failure.error_file_data.get("message")
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def exit_code(code: int) -> int:
    """As shells count: 137 for a process that SIGKILL ended."""
    return code if code >= 0 else 128 - code


def tell(sentence: str) -> None:
    """Leave the cause to run.py, or say it."""
    file = os.environ.get(CAUSE_FILE)
    if file:
        Path(file).write_text(sentence, encoding="utf-8")
    else:
        print(f"error: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
