"""Share work between processes: each computes its rows and gets those of all, and the main process decides."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, patch_environment

T = TypeVar("T")
NOTHING_ELSE = nullcontext()
PATIENCE = 20.0  # seconds: a network file system may show late what another machine has written


class MainProcessError(ValueError):
    """What failed on the main process, in its words, on another process."""


def gather_rows(
    blocks: Sequence[Sequence[int]],
    compute: Callable[[list[int]], Iterable[T]],
    during: AbstractContextManager = NOTHING_ELSE,
) -> list[T]:
    """Compute an item for each row, every process those of its blocks; return all items in order of the rows.

    Every process calls this, and computes every n-th block: the blocks are the same for any number n of processes.
    `during` is entered for what a process computes alone, before they wait for each other.
    """
    state, items = PartialState(), []
    with during:
        for block in blocks[state.process_index :: state.num_processes]:
            items += zip(block, compute(list(block)), strict=True)
    return [item for _, item in sorted(gather_object(items), key=lambda pair: pair[0])]


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on the main process and return its result on every process.

    Raises:
        ValueError, OSError, FloatingPointError: what the main process raised; on the others a MainProcessError with
            the same message.
    """
    outcome: list[object] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [function(), None]
        except (ValueError, OSError, FloatingPointError) as error:
            broadcast_object_list([None, str(error)])
            raise
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise MainProcessError(problem)
    return result


def shared_directory_problem(directory: Path) -> str | None:
    """Say, on every process, which one cannot see what the main process writes to `directory`; None if all can.

    A file is written there and removed, and with it the directory if nothing else is in it.

    Raises:
        ValueError, OSError: as `on_main`, where the main process cannot write there.
    """
    state = PartialState()
    if state.num_processes == 1:
        return None
    mark = directory / on_main(lambda: _write_mark(directory))
    deadline = time.monotonic() + PATIENCE
    while not mark.is_file() and time.monotonic() < deadline:
        with suppress(OSError):
            os.listdir(directory)  # asks the file server again
        time.sleep(0.05)
    where = f"process {state.process_index} on {socket.gethostname()} ({directory.absolute()})"
    (writer, _), *others = gather_object([(where, mark.is_file())])
    if state.is_main_process:
        mark.unlink()
        with suppress(OSError):  # other files are in it
            directory.rmdir()
    blind = [name for name, sees in others if not sees]
    share = "output_dir must be on a file system that all machines share"
    return f"{blind[0]} does not see what {writer} writes: {share}" if blind else None


def _write_mark(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / f".mark-{secrets.token_hex(8)}"
    mark.touch()
    return mark.name


def launched_engine() -> str | None:
    """Return what shards this process's model, by the environment that accelerate launch has made."""
    variables = {"FSDP": "FSDP", "DeepSpeed": "DEEPSPEED", "Megatron-LM": "MEGATRON_LM"}
    engine = next((name for name, word in variables.items() if parse_flag_from_env(f"ACCELERATE_USE_{word}")), None)
    return "FSDP1" if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") == "1" else engine


def other_fsdp_settings() -> list[str]:
    """Name the settings of accelerate launch under which Relay's own sharding would not do what they say."""
    wanted = {
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "PARALLELISM_CONFIG_TP_SIZE": "1",
        "PARALLELISM_CONFIG_CP_SIZE": "1",
        "PARALLELISM_CONFIG_SP_SIZE": "1",
    }
    return [
        f"{name.lower()}: {value}" for name, value in wanted.items() if os.environ.get(name, value).lower() != value
    ]


def without_engine() -> AbstractContextManager:
    """Let accelerate see a group of processes that each hold a whole model, until the block ends."""
    return patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_PARALLELISM_CONFIG="false")
