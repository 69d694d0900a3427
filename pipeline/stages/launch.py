"""Process groups of the stages: which options accelerate launch gets, and how a group is started and ended."""

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, parse_flag_from_env

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 30  # for a stage that was told to stop, before it is killed
ENGINES = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}
# What each stage needs a whole model on every process for.
WHOLE = {
    "sft": "this stage knows FSDP and DeepSpeed alone",
    "reward": "a reward model is an adapter over a whole model on each",
    "ppo": "PPO's policy, reference and values are adapters over a whole model on each, which also writes",
    "eval": "each answers its share of the prompts with a whole model",
}


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
    """How many processes accelerate launch starts with these options, on all machines together.

    Unknown options end the program with code 2.

    Raises:
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments, config = _read(options)
    if arguments.cpu:
        return 1
    here = torch.accelerator.device_count()
    count = arguments.num_processes or (config.num_processes if config else here)
    machines = arguments.num_machines or (config.num_machines if config else 1)
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, None)  # accelerate starts a MULTI_CPU by MPI, or as one
    several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed or here > 1
    if config is not None:
        several = several or config.distributed_type not in kinds
    return max(1, count // machines * machines) if several else 1  # as many on each machine


def machine_rank(options: Sequence[str]) -> int:
    """Which of several machines this one is; the one of rank 0 alone sets earlier results aside.

    Raises:
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments, config = _read(options)
    given = arguments.machine_rank if arguments.machine_rank is not None else config and config.machine_rank
    return int(given or 0)


def sharding_engine(options: Sequence[str]) -> str | None:
    """What these options of accelerate launch shard the model with: `FSDP`, `DeepSpeed`, `Megatron-LM`, or None.

    Raises:
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments, config = _read(options)
    chosen = {
        DistributedType.FSDP: arguments.use_fsdp,
        DistributedType.DEEPSPEED: arguments.use_deepspeed,
        DistributedType.MEGATRON_LM: arguments.use_megatron_lm,
    }
    if arguments.cpu:
        return None
    if any(chosen.values()) or arguments.multi_gpu:  # options stand above the file
        return next((ENGINES[kind] for kind, used in chosen.items() if used), None)
    return ENGINES.get(config.distributed_type) if config is not None else None


def launched_engine() -> str | None:
    """The same for this process, by what accelerate launch has put into its environment."""
    variables = {"FSDP": "FSDP", "DeepSpeed": "DEEPSPEED", "Megatron-LM": "MEGATRON_LM"}
    return next((name for name, part in variables.items() if parse_flag_from_env(f"ACCELERATE_USE_{part}")), None)


def engine_problem(stage: str, engine: str | None) -> str | None:
    """Why a stage cannot run under an engine that shards the model, and what to use instead; None if it can."""
    if engine is None or (stage == "sft" and engine != "Megatron-LM"):
        return None
    return (
        f"{stage}: {engine} shards the model over the processes, and {WHOLE[stage]}; launch it with "
        "accelerate_configs/multi_gpu.yaml or multi_node.yaml; FSDP and DeepSpeed are for sft alone (--only sft)"
    )


def _read(options: Sequence[str]) -> tuple[argparse.Namespace, ClusterConfig | None]:
    """The options as accelerate launch reads them, and its configuration file if it takes one."""
    arguments = launch_command_parser().parse_args([*options, "stage.py"])
    uses_file = arguments.config_file or (Path(default_config_file).is_file() and not arguments.cpu)
    return arguments, load_config_from_file(arguments.config_file) if uses_file else None


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
