"""Stages as process groups: the options accelerate launch gets, and how a group is started, watched and ended."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from rich.console import Console

from pipeline.recipe import Recipe, RecipeError
from pipeline.runtime.devices import has_accelerator
from pipeline.runtime.signals import handled
from pipeline.stages.directory import RunDirectory, script_of, set_aside, stage_option
from pipeline.stages.fingerprint import stage_status
from pipeline.stages.first_failure import CAUSE_FILE, GRACE_SECONDS
from pipeline.stages.lock import RunInUseError, run_lock
from pipeline.stages.plan import PlannedStage, print_line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENGINES = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}
SCRIPTS = Path(__file__).resolve().parent.parent


class StageError(Exception):
    """A stage that was launched did not end well, or could not be launched; `exit_code` is run.py's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch_stage(
    console: Console,
    recipe: Recipe,
    planned: PlannedStage,
    path: Path,
    overrides: Sequence[str],
    options: Sequence[str],
) -> None:
    """Launch a stage and wait until it is complete.

    `run.py` runs on each of several machines. The one of rank 0 alone sets an earlier result aside.

    Raises:
        StageError: another run is at work there, or the stage failed.
    """
    run, stage, leads = RunDirectory.of(recipe), planned.stage, machine_rank(options) == 0
    if leads:
        _set_earlier_result_aside(console, run, planned)
    print_line(console, f"{stage}: {'continuing' if planned.action == 'resume' else 'starting'}", style="bold")
    began = time.monotonic()
    code, cause = launch_and_ask(stage_command(stage, path, overrides, options))
    if code > 128 and (name := signal_name(code - 128)):
        raise StageError(f"{stage} was ended by {name}; the same command continues there{cause}", code)
    if code:
        raise StageError(f"{stage} failed with exit code {code}; the same command continues there{cause}", code)
    if leads and stage_status(run, recipe, stage) != "complete":  # other machines may see the record later
        raise StageError(f"{stage} ended without finishing {run.stage(stage)}; the same command continues there", 1)
    print_line(console, f"{stage}: done in {time.monotonic() - began:.0f} s")


def _set_earlier_result_aside(console: Console, run: RunDirectory, planned: PlannedStage) -> None:
    directory = run.stage(planned.stage)
    try:
        with run_lock(run.path):  # the stage itself holds it later
            if planned.replaces and directory.exists():
                moved = set_aside(directory)
                print_line(console, f"{planned.stage}: what was in {directory} is kept in {moved}")
    except RunInUseError as error:
        raise StageError(str(error), 2) from error
    except OSError as error:
        raise StageError(f"{planned.stage}: {error}", 2) from error


def stage_command(stage: str, path: Path, overrides: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the command of one stage's process group."""
    # Not accelerate itself: its traceback would bury the message of the stage.
    launcher = [sys.executable, "-m", "pipeline.stages.first_failure"]
    script = SCRIPTS / f"{script_of(stage)}.py"
    return [*launcher, *thread_options(options), *options, str(script), str(path), *overrides, *stage_option(stage)]


def launch_and_ask(command: Sequence[str]) -> tuple[int, str]:
    """Launch a stage; return its exit code, and which process failed first and why as the end of a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CAUSE_FILE] = str(Path(folder) / "cause")
        code = launch(command)
        file = Path(os.environ.pop(CAUSE_FILE))
        cause = " ".join(file.read_text(encoding="utf-8").split()) if file.is_file() else ""
    return code, f": {cause}" if cause else ""


def default_launch_options() -> list[str]:
    """Return options for accelerate launch where the user gives none: for the accelerators here, else all CPU cores.

    They are complete, because accelerate prints a warning for each it has to choose. On a machine with accelerators
    a configuration made by `accelerate config` is used as it is.
    """
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if not has_accelerator():
        threads = ["--num_cpu_threads_per_process", str(torch.get_num_threads())]  # respects OMP_NUM_THREADS
        return ["--cpu", "--num_processes", "1", *common, *threads]
    if Path(default_config_file).is_file():
        return []
    count = torch.accelerator.device_count()
    return [*(["--multi_gpu"] if count > 1 else []), "--num_processes", str(count), *common]


def process_count(options: Sequence[str]) -> int:
    """Return how many processes accelerate launch starts with these options, on all machines together.

    Unknown options end the program with code 2.

    Raises:
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments, config = _read(options)
    if arguments.cpu:
        return 1
    here = torch.accelerator.device_count()
    count = arguments.num_processes or (config.num_processes if config else here)
    machines = _machine_count(arguments, config)
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, None)  # accelerate starts a MULTI_CPU by MPI, or as one
    several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed or here > 1
    if config is not None:
        several = several or config.distributed_type not in kinds
    return max(1, count // machines * machines) if several else 1  # as many on each machine


def thread_options(options: Sequence[str]) -> list[str]:
    """Return options by which the processes of a machine with accelerators share its CPU cores.

    Accelerate gives each of them one thread, and what they do before their models are on a GPU takes minutes. There
    are none where OMP_NUM_THREADS or the options say how many.
    """
    arguments, config = _read(options)
    chosen = arguments.num_cpu_threads_per_process is not None or "OMP_NUM_THREADS" in os.environ
    if chosen or arguments.cpu or not has_accelerator():
        return []
    here = process_count(options) // _machine_count(arguments, config)
    return ["--num_cpu_threads_per_process", str(max(1, torch.get_num_threads() // max(1, here)))]


def machine_rank(options: Sequence[str]) -> int:
    """Return which of several machines this one is, by the options of accelerate launch.

    Raises:
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments, config = _read(options)
    given = arguments.machine_rank if arguments.machine_rank is not None else config and config.machine_rank
    return int(given or 0)


def sharding_engine(options: Sequence[str]) -> str | None:
    """Return what accelerate launch shards the model with: `FSDP`, `FSDP1`, `DeepSpeed`, `Megatron-LM`, or None.

    `FSDP` is its second version, FSDP2, and `FSDP1` the first, which accelerate takes where no version is given.

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
        engine = next((ENGINES[kind] for kind, used in chosen.items() if used), None)
    else:
        engine = ENGINES.get(config.distributed_type) if config is not None else None
    in_file = config.fsdp_config.get("fsdp_version") if config is not None and engine == "FSDP" else None
    version = in_file if in_file is not None and str(arguments.fsdp_version) == "1" else arguments.fsdp_version
    return "FSDP1" if engine == "FSDP" and str(version) == "1" else engine


def _machine_count(arguments: argparse.Namespace, config: ClusterConfig | None) -> int:
    return arguments.num_machines or (config.num_machines if config else 1)


def _read(options: Sequence[str]) -> tuple[argparse.Namespace, ClusterConfig | None]:
    """Parse the options as accelerate launch does, and its configuration file if it takes one.

    Raises:
        RecipeError: a word is no option, such as an override of the recipe, or the file is no configuration.
        FileNotFoundError: the `--config_file` does not exist.
    """
    arguments = launch_command_parser().parse_args([*options, "stage.py"])
    if arguments.training_script != "stage.py":
        word = arguments.training_script
        raise RecipeError(
            f"after -- come options of accelerate launch alone, found {word!r}; overrides come before --"
        )
    if not arguments.config_file and (arguments.cpu or not Path(default_config_file).is_file()):
        return arguments, None
    try:
        return arguments, load_config_from_file(arguments.config_file)
    except FileNotFoundError:
        raise
    except Exception as error:  # accelerate and YAML raise errors of many kinds
        file = arguments.config_file or default_config_file
        raise RecipeError(f"{file}: no configuration of accelerate launch ({error})") from error


def launch(command: Sequence[str]) -> int:
    """Run a command in a process group of its own, passing signals on.

    The first signal is for the command, which tells those that it started. The second also reaches those that have
    left its group, as torch's agent starts its workers. The third kills all of them.

    Returns:
        Its exit code; 128 + the number of the signal that ended it, or that ended this program.
    """
    received: list[int] = []
    groups: list[int] = []  # the command's own, then those that left it

    def forward(number: int, frame: object = None) -> None:
        received.append(number)
        if groups:
            pass_on(number, groups, len(received))

    with handled(dict.fromkeys(SIGNALS, forward)):
        process = subprocess.Popen(command, start_new_session=True)
        groups.append(process.pid)
        if received:  # before the group was known
            pass_on(received[0], groups, 1)
        code = process.wait()
        if received:
            end_groups(groups)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def pass_on(number: int, groups: list[int], times: int) -> None:
    """Pass on a signal that came `times` times; groups that are not known yet are added to `groups`."""
    told = groups[:1] if times == 1 else groups
    with suppress(psutil.NoSuchProcess):  # a command that has ended leaves its group
        for child in psutil.Process(groups[0]).children(recursive=True):
            with suppress(ProcessLookupError):
                group = os.getpgid(child.pid)
                groups += [] if group in groups else [group]
        if times == 2 and len(groups) > 1:
            told = groups[1:]  # torch's agent, told again, would end its workers in the midst of their own end
    for group in told:
        with suppress(ProcessLookupError):
            os.killpg(group, number if times < 3 else signal.SIGKILL)


def end_groups(groups: Sequence[int]) -> None:
    """Wait until no process of the groups runs any more: the launcher may end while the stage is still saving."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        if not any(is_in(groups, process) for process in psutil.process_iter()):
            return
        time.sleep(0.1)
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def is_in(groups: Sequence[int], process: psutil.Process) -> bool:
    """Tell whether a process is a live member of a group. Zombies are ignored: without an init process they stay."""
    try:
        return os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False


def signal_name(number: int) -> str | None:
    """Return `SIGTERM` for 15, or None for no signal."""
    return signal.Signals(number).name if number in set(signal.Signals) else None
