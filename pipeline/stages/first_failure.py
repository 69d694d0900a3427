"""The launcher of a stage: accelerate launch, and the first failure of its processes in one sentence."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from pipeline.runtime.files import write_atomically

CAUSE_FILE = "RELAY_CAUSE_FILE"  # names the file in which run.py looks for the cause
GRACE_SECONDS = 150  # for a stage that was told to stop, before it is killed: Slurm gives it 180
ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # of processes that the agent terminates once another has failed


def main(argv: Sequence[str]) -> int:
    """Launch with the arguments of `accelerate launch`; return the exit code of the first process that failed.

    A signal that ends the launch is 128 + its number, once the processes have ended.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        tell(cause(rank, failure))
        return exit_code(failure.exitcode)
    except subprocess.CalledProcessError as error:  # one process, which has said why if it could
        return exit_code(error.returncode)
    except SignalException as error:  # of several processes, which have got the signal from torch's agent
        return 128 + error.sigval
    except KeyboardInterrupt:  # of one process, which has got it too
        return 128 + signal.SIGINT
    return 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first.

    Ranks that failed because another one disconnected, or that the agent terminated, come last.
    """

    def order(rank: int) -> tuple[bool, bool, float]:
        failure, record = failures[rank], _failure_record(failures[rank])
        return bool(record.get("consequence")), failure.exitcode in ENDED, record.get("seconds", failure.timestamp)

    rank = min(failures, key=order)
    return rank, failures[rank]


def cause(rank: int, failure: ProcessFailure) -> str:
    """Return why a process failed: the message it left, else its exit code."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"process {rank} was ended by {name}{hint}"
    record = _failure_record(failure)
    if "seconds" not in record:  # not written by Relay, so its text is a whole traceback
        return f"process {rank} failed with exit code {failure.exitcode}"
    message = record["py_callstack"]
    return message if message.startswith("process ") else f"process {rank} failed: {message}"


def _failure_record(failure: ProcessFailure) -> dict:
    """Return what `record_failure` wrote in the process, if it did."""
    message = failure.error_file_data.get("message")
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def exit_code(code: int) -> int:
    """Return an exit code as shells count: 137 for a process that SIGKILL ended."""
    return code if code >= 0 else 128 - code


def tell(sentence: str) -> None:
    """Write the cause for run.py, or print it where run.py does not wait for it."""
    file = os.environ.get(CAUSE_FILE)
    if file:
        write_atomically(Path(file), sentence)
    else:
        print(f"error: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
