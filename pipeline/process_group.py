"""Process groups of the stages: which options accelerate launch gets, and how a group is started and ended."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 30  # for a stage that was told to stop, before it is killed


def default_launch_options() -> list[str]:
    """Options for accelerate launch where the user gives none: the accelerators that are here, else all CPU cores.

    They are complete, because accelerate prints a warning for each it has to choose. On a machine with accelerators
    a configuration made by `accelerate config` is used as it is.
    """
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if not torch.accelerator.is_available():
        threads = ["--num_cpu_threads_per_process", str(torch.get_num_threads())]  # respects OMP_NUM_THREADS
        return ["--cpu", "--num_processes", "1", *common, *threads]
    if Path(default_config_file).is_file():
        return []
    count = torch.accelerator.device_count()
    return [*(["--multi_gpu"] if count > 1 else []), "--num_processes", str(count), *common]


def process_count(options: Sequence[str]) -> int:
    """How many processes accelerate launch starts with these options; unknown options end the program with code 2.

    Raises:
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments = launch_command_parser().parse_args([*options, "stage.py"])
    if arguments.cpu:
        return 1
    config = None
    if arguments.config_file or Path(default_config_file).is_file():
        config = load_config_from_file(arguments.config_file)
    here = torch.accelerator.device_count()
    count = arguments.num_processes or (config.num_processes if config else here)
    several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed or here > 1
    if config is not None:
        several = several or config.distributed_type not in (DistributedType.NO, None)
    return max(1, count) if several else 1


def launch(command: Sequence[str]) -> int:
    """Run a command in a process group of its own, passing signals on to all of it.

    Returns:
        Its exit code; 128 + the number of the signal that ended it, or that ended this program.
    """
    received: list[int] = []
    groups: list[int] = []

    def forward(number: int, frame: object = None) -> None:
        received.append(number)
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, number if len(received) < 3 else signal.SIGKILL)

    with handled(dict.fromkeys(SIGNALS, forward)):
        process = subprocess.Popen(command, start_new_session=True)
        groups.append(process.pid)
        if received:  # before the group was known
            forward(received[0])
        code = process.wait()
        if received:
            end_group(process.pid)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


@contextmanager
def handled(handlers: Mapping[int, object]) -> Iterator[None]:
    """Signal handlers for the time of a block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(group: int) -> None:
    """Wait until no process of a group runs any more; the launcher may go before the stage, which may be saving."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        if not any(in_group(process, group) for process in psutil.process_iter()):
            return
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def in_group(process: psutil.Process, group: int) -> bool:
    """Whether a process is of a group and not a zombie, which where nobody collects them stays for ever."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False


def signal_name(number: int) -> str | None:
    """`SIGTERM` for 15."""
    return signal.Signals(number).name if number in set(signal.Signals) else None
