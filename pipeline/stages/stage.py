"""One stage from begin to end: whether it begins, its records, and with which exit code and sentence it ends."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from torch.distributed import DistError

from pipeline.models.hub import fetch_commit
from pipeline.recipe import Recipe
from pipeline.runtime.abort import record_failure
from pipeline.runtime.devices import APPLE_GPU_IDLE, has_accelerator, has_apple_gpu
from pipeline.runtime.distributed import MainProcessError, launched_engine, on_main, shared_directory_problem
from pipeline.runtime.libraries import choose_attention_kernels, limit_kernel_cache, quiet_libraries
from pipeline.runtime.memory import is_out_of_memory, peak_memory_mib
from pipeline.runtime.messages import one_line, say
from pipeline.runtime.signals import Stopped
from pipeline.runtime.watchdog import VARIABLE, timeout_minutes
from pipeline.stages.directory import (
    FINISHED,
    STARTED,
    RunDirectory,
    read_record,
    script_of,
    set_aside,
    versions,
    write_record,
)
from pipeline.stages.engines import engine_problem, fsdp_problem
from pipeline.stages.fingerprint import STATE, external_models, setting_differences, stage_state, stage_status
from pipeline.stages.lock import RunInUseError, run_lock
from pipeline.stages.model_cards import write_model_cards
from pipeline.stages.plan import missing_input
from pipeline.trainers.ppo.exchange import LastPassError

StageBody = Callable[[Recipe, RunDirectory], dict[str, object]]
OUT_OF_MEMORY = (
    "out of memory: lower {section}.per_device_train_batch_size and raise {section}.gradient_accumulation_steps by "
    "as much, which changes no result, or set {section}.gradient_checkpointing: true; with other settings the stage "
    "starts again from its first step ({error})"
)
OUT_OF_MEMORY_IN_EVAL = "out of memory with one text at a time: set model.dtype: bfloat16 ({error})"
# gloo raises plain RuntimeErrors, so its errors are known by their words alone.
GLOO_WORDS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection refused")
SLOW_PROCESS = f" (where it is only slow, set {VARIABLE} to more minutes)"
CODE_IS_RUN = "model.trust_remote_code is true: Python code that comes with the recipe's models is run"


class CannotStartError(Exception):
    """A stage cannot begin: exit code 2, and nothing was changed."""


@dataclass(frozen=True)
class Decision:
    """Whether a stage begins, what is said in either case, and the exit code where it does not begin."""

    begins: bool
    lines: tuple[str, ...] = ()
    exit_code: int = 0


@dataclass(frozen=True)
class StageEnd:
    """How a stage ends that was not done: its exit code and message.

    A process that `failed` leaves its message for the launcher too; it is a `consequence` where the cause is another
    process, and is not printed where that one prints the same.
    """

    exit_code: int
    message: str
    failed: bool = False
    consequence: bool = False
    is_printed: bool = True


def run_stage(recipe: Recipe, stage: str, body: StageBody) -> int:
    """Run `body` between the stage's begin and end records, alone in the run directory.

    A failure that the user can mend is one sentence; RELAY_TRACEBACK=1 shows where it arose.

    Returns:
        The exit code: 0 done, 1 failed, 2 cannot start, 128 + the number of the signal that ended it.
    """
    run = RunDirectory.of(recipe)
    try:
        prepare_process(run)
        decision = on_main(lambda: decide(run, recipe, stage))
        with ExitStack() as held:
            if decision.begins:
                lock_for_all(run, held)
                decision = on_main(lambda: decide(run, recipe, stage))  # again: another run may have just finished it
            say(*decision.lines)
            return run_body(run, recipe, stage, body) if decision.begins else decision.exit_code
    except (Exception, KeyboardInterrupt) as error:
        outcome = outcome_of(stage, error)
        if outcome is None:
            record_failure(f"{stage}: {one_line(f'{type(error).__name__}: {error}')}")
            raise  # an error of Relay's own: its traceback is shown
        return end_with(stage, outcome)


def prepare_process(run: RunDirectory) -> None:
    """Join the process group, set up the libraries, and see that all processes share the run directory.

    Raises:
        CannotStartError: a timeout that is none, or a run directory that some process cannot see.
        ValueError, OSError: the run directory cannot be written.
    """
    try:
        patience = timedelta(minutes=timeout_minutes(), seconds=30)  # the watchdog, which knows more, ends it first
    except ValueError as error:
        raise CannotStartError(str(error)) from error
    PartialState(cpu=not has_accelerator(), timeout=patience)
    if has_apple_gpu():
        say(APPLE_GPU_IDLE)
    quiet_libraries()
    limit_kernel_cache()
    choose_attention_kernels()
    if problem := shared_directory_problem(run.path):
        raise CannotStartError(problem)


def decide(run: RunDirectory, recipe: Recipe, stage: str) -> Decision:
    """Decide whether a stage begins. The main process decides for all: others may see its files some seconds later."""
    engine = launched_engine()
    problem = engine_problem(stage, engine, recipe.model.load_in_4bit) or fsdp_problem(stage, engine)
    if problem := problem or missing_input(recipe, stage):
        return Decision(False, (f"error: {problem}",), exit_code=2)
    status = stage_status(run, recipe, stage)
    if status == "complete":
        return Decision(False, (f"{stage}: already complete in {run.stage(stage)}",))
    lines = (f"{stage}: {CODE_IS_RUN}",) if recipe.model.trust_remote_code else ()
    if status == "changed":
        differences = (f"  {line}" for line in setting_differences(run, recipe, stage))
        lines += (f"{stage}: changed since {run.stage(stage)} was made:", *differences)
    return Decision(True, lines)


def lock_for_all(run: RunDirectory, held: ExitStack) -> None:
    """Take the run directory on the main process, for all processes, until `held` ends.

    Raises:
        CannotStartError: another run holds it.
    """

    def lock() -> tuple[str | None, str | None]:
        try:
            return held.enter_context(run_lock(run.path)), None
        except RunInUseError as error:
            return None, str(error)

    earlier_holder, problem = on_main(lock)
    if problem:
        raise CannotStartError(problem)
    if earlier_holder:
        say(f"{run.path}: {earlier_holder} did not end well; going on from what it left")


def run_body(run: RunDirectory, recipe: Recipe, stage: str, body: StageBody) -> int:
    """Write the stage's first record, run `body`, and write its last record with what `body` returned; return 0."""
    state = PartialState()
    moved = on_main(lambda: begin_stage(run, recipe, stage))
    if moved:
        say(f"{stage}: the earlier result, made with other settings, is now in {moved}")
    summary = body(recipe, run)
    if state.is_main_process:
        write_model_cards(recipe, run, stage)
        finish_stage(run, recipe, stage, processes=state.num_processes, peak_memory_mib=peak_memory_mib(), **summary)
    state.wait_for_everyone()
    return 0


def begin_stage(run: RunDirectory, recipe: Recipe, stage: str) -> Path | None:
    """Make a stage's directory ready and write `recipe.yaml` and the stage's `started.json`; one process calls it.

    An interrupted stage with the same settings is left as it is, to be resumed. Anything else that is there is set
    aside, never overwritten; returns where it went.
    """
    status = stage_status(run, recipe, stage)
    moved = set_aside(run.stage(stage)) if status in ("changed", "complete") else None
    for path, revision in external_models(recipe, stage).items():
        fetch_commit(path, revision)  # the stage loads this snapshot and records its commit
    run.save_recipe(recipe)
    run.stage(stage).mkdir(parents=True, exist_ok=True)
    before = seconds_before(run.stage(stage)) if status == "partial" else 0.0
    record = {"stage": stage, "started_at": time.time(), "seconds_before": before, **stage_state(recipe, stage)}
    write_record(run.stage(stage) / STARTED, record)
    return moved


def seconds_before(directory: Path) -> float:
    """Compute how long an interrupted stage has worked, until it last wrote a file."""
    started = read_record(directory / STARTED)
    last = max((path.stat().st_mtime for path in directory.rglob("*") if path.is_file()), default=0.0)
    return started.get("seconds_before", 0.0) + max(0.0, last - started.get("started_at", last))


def finish_stage(run: RunDirectory, recipe: Recipe, stage: str, **summary: Any) -> Path:
    """Write `stage.json`, the last file of a stage: only a stage that has it is complete; one process calls it.

    What the stage depends on is recorded as it was at `begin_stage`, whatever was edited since. `seconds` are those
    since then, and those before an interruption, unless the summary has its own.
    """
    started = read_record(run.stage(stage) / STARTED)
    recorded = {key: started[key] for key in STATE if key in started}
    record = {
        "seconds": round(time.time() - started.get("started_at", time.time()) + started.get("seconds_before", 0.0), 3),
        **summary,
        "stage": stage,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **(recorded or stage_state(recipe, stage)),
    }
    file = run.stage(stage) / FINISHED
    write_record(file, record)
    return file


def outcome_of(stage: str, error: BaseException) -> StageEnd | None:
    """Return how an error ends a stage, or None for an error that is not the user's to mend."""
    match error:
        case CannotStartError():
            return StageEnd(2, f"error: {stage}: {error}")
        case Stopped():
            return StageEnd(error.exit_code, f"{stage}: {error}")
        case KeyboardInterrupt():
            return StageEnd(
                128 + signal.SIGINT, f"{stage}: ended by Ctrl-C; the same command continues from the last checkpoint"
            )
        case MainProcessError():
            return StageEnd(1, str(error), failed=True, consequence=True, is_printed=False)
        case ValueError() | OSError() | FloatingPointError() | SafetensorError():  # the last: weights on a full disk
            return StageEnd(1, str(error), failed=True)
    if isinstance(error, LastPassError) or is_out_of_memory(error):
        advice = OUT_OF_MEMORY_IN_EVAL if stage == "eval" else OUT_OF_MEMORY
        return StageEnd(1, advice.format(section=script_of(stage), error=error), failed=True)
    if is_lost_connection(error):
        hint = SLOW_PROCESS if "Timed out" in str(error) else ""
        lost = f"another process is gone or does not answer{hint}: {error}"
        return StageEnd(1, lost, failed=True, consequence=True)
    return None


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error only says that this process cannot reach another one."""
    if PartialState().num_processes == 1:
        return False
    gloo = isinstance(error, RuntimeError) and any(words in str(error) for words in GLOO_WORDS)
    return gloo or isinstance(error, DistError)


def end_with(stage: str, outcome: StageEnd) -> int:
    """Print the message of an outcome, on each process that failed by itself, else once; return its exit code."""
    if not outcome.failed:
        say(outcome.message)
        return outcome.exit_code
    state, sentence = PartialState(), f"{stage}: {one_line(outcome.message)}"
    record_failure(sentence, outcome.consequence)
    if not outcome.is_printed:
        return outcome.exit_code
    if os.environ.get("RELAY_TRACEBACK"):
        traceback.print_exc()
    rank = f"process {state.process_index} of {state.num_processes}: " if state.num_processes > 1 else ""
    print(f"error: {rank}{sentence}", file=sys.stderr, flush=True)
    return outcome.exit_code
