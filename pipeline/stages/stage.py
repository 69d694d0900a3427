"""What the stage scripts share: when a stage may run, where its models are, how it ends."""

import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets.utils.logging import disable_progress_bar
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.models.from_scratch import build_from_scratch
from pipeline.recipe import Recipe
from pipeline.rewards.classifier import ClassifierReward
from pipeline.rewards.learned import (
    CALIBRATION_ROWS,
    AdapterReward,
    is_reward_folder,
    load_learned_reward,
    reward_on_references,
)
from pipeline.runtime.abort import record_failure
from pipeline.runtime.distributed import unseen
from pipeline.runtime.memory import is_out_of_memory
from pipeline.runtime.messages import one_line
from pipeline.runtime.signals import Stopped
from pipeline.runtime.watchdog import timeout_minutes
from pipeline.stages.directory import (
    RunDirectory,
    begin_stage,
    finish_stage,
    missing_input,
    setting_differences,
    stage_status,
)
from pipeline.stages.launch import engine_problem, launched_engine
from pipeline.stages.lock import RunInUseError, run_lock
from pipeline.tasks import Task, load_task
from pipeline.trainers.ppo.learner import LastPassError

OUT_OF_MEMORY = (
    "out of memory: lower {stage}.per_device_train_batch_size and raise {stage}.gradient_accumulation_steps by as "
    "much, which changes no result, or set {stage}.gradient_checkpointing: true ({error})"
)
StageBody = Callable[[Recipe, RunDirectory], dict[str, object]]


def run_stage(recipe: Recipe, stage: str, body: StageBody) -> int:
    """Run `body` between the stage's begin and end records, alone in the run directory.

    A failure that the user can mend (ValueError, OSError) is one sentence; RELAY_TRACEBACK=1 shows where it arose.
    What a process fails of is left for the launcher, so that the first of several can be named.

    Returns:
        The exit code: 0 done, 1 failed, 2 cannot start, 128 + the number of the signal that ended it.
    """
    try:
        patience = timedelta(minutes=timeout_minutes(), seconds=30)  # the watchdog, which knows more, comes first
    except ValueError as error:
        print(f"error: {stage}: {error}", file=sys.stderr)
        return 2
    run, state = RunDirectory.of(recipe), PartialState(cpu=not torch.accelerator.is_available(), timeout=patience)
    quiet_libraries()
    limit_kernel_cache()
    try:
        refusal = unseen(run.path)
    except (ValueError, OSError) as error:
        return _failed(stage, str(error))
    if refusal:
        say(f"error: {stage}: {refusal}")
        return 2
    # The main process decides for all: on a network's file system others may see what it wrote some seconds later.
    decided: list[str | None] = [None, None]
    if state.is_main_process:
        decided = [
            engine_problem(stage, launched_engine()) or missing_input(recipe, stage),
            stage_status(run, recipe, stage),
        ]
    problem, status = broadcast_object_list(decided)
    if problem or status == "complete":
        say(f"error: {problem}" if problem else f"{stage}: already complete in {run.stage(stage)}")
        return 2 if problem else 0
    if recipe.model.trust_remote_code:
        say(f"{stage}: model.trust_remote_code is true: Python code that comes with the recipe's models is run")
    try:
        with ExitStack() as held:
            if refusal := _lock(run, held):
                say(f"error: {stage}: {refusal}")
                return 2
            return _run_alone(recipe, stage, body, run)
    except Stopped as stop:
        say(f"{stage}: {stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        say(f"{stage}: ended by Ctrl-C; the same command continues from the last checkpoint")
        return 128 + signal.SIGINT
    except (ValueError, OSError, FloatingPointError) as error:
        return _failed(stage, str(error))
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, LastPassError):
            return _failed(stage, OUT_OF_MEMORY.format(stage=stage, error=error))
        if is_lost_connection(error):
            return _failed(stage, f"another process is gone or does not answer: {error}", consequence=True)
        record_failure(f"{stage}: {one_line(f'{type(error).__name__}: {error}')}")
        raise  # not the user's to mend: its traceback is shown


def _failed(stage: str, message: str, consequence: bool = False) -> int:
    """Say why the stage failed, in one line, here and to the launcher; the exit code."""
    if os.environ.get("RELAY_TRACEBACK"):
        traceback.print_exc()
    state, sentence = PartialState(), f"{stage}: {one_line(message)}"
    record_failure(sentence, consequence)
    where = f"process {state.process_index} of {state.num_processes}: " if state.num_processes > 1 else ""
    print(f"error: {where}{sentence}", file=sys.stderr, flush=True)
    return 1


def is_lost_connection(error: Exception) -> bool:
    """Whether an error only says that this process cannot reach another one, as gloo and NCCL put it."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "NCCL", "Connection refused")
    several = PartialState().num_processes > 1 and isinstance(error, RuntimeError)
    return several and any(word in str(error) for word in words)


def _lock(run: RunDirectory, held: ExitStack) -> str | None:
    """Take the run directory, on the main process for all; why it cannot be had, on every process."""
    refusal: list[str | None] = [None]
    if PartialState().is_main_process:
        try:
            left = held.enter_context(run_lock(run.path))
            if left:
                say(f"{run.path}: {left} did not end well; going on from what it left")
        except RunInUseError as error:
            refusal = [str(error)]
    return broadcast_object_list(refusal)[0]


def _run_alone(recipe: Recipe, stage: str, body: StageBody, run: RunDirectory) -> int:
    state = PartialState()
    # Again: another run may have finished it before it let go.
    [status] = broadcast_object_list([stage_status(run, recipe, stage) if state.is_main_process else None])
    if status == "complete":
        say(f"{stage}: already complete in {run.stage(stage)}")
        return 0
    if state.is_main_process:
        if status == "changed":
            differences = setting_differences(run, recipe, stage)
            say(f"{stage}: changed since {run.stage(stage)} was made:", *(f"  {line}" for line in differences))
        moved = begin_stage(run, recipe, stage)
        if moved:
            say(f"{stage}: the earlier result, made with other settings, is now in {moved}")
    state.wait_for_everyone()
    summary = body(recipe, run)
    if state.is_main_process:
        finish_stage(run, recipe, stage, processes=state.num_processes, peak_memory_mib=peak_memory_mib(), **summary)
    state.wait_for_everyone()
    return 0


def say(*lines: str) -> None:
    """Lines on stderr, from the main process alone."""
    if PartialState().is_main_process:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def peak_memory_mib() -> float:
    """The most memory this process has held: what torch allocated on its accelerator, else what the system gave it."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def load_recipe_task(recipe: Recipe) -> Task:
    """The recipe's task; what was left out of the data is said.

    Raises:
        TaskError: as `load_task`.
    """
    task = load_task(recipe.task.name, recipe.task.config)
    say_left_out("task", task.left_out)
    return task


def say_left_out(section: str, left_out: Sequence[str]) -> None:
    """How many rows give no example, and the first three of them."""
    if left_out:
        rows = "1 row is" if len(left_out) == 1 else f"{len(left_out):,} rows are"
        more = f"; and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        say(one_line(f"{section}: {rows} left out: {'; '.join(left_out[:3])}{more}"))


def left_out_record(task: Task) -> dict[str, object]:
    """For stage.json: how many rows were left out and the first three, if any were."""
    if not task.left_out:
        return {}
    return {"rows_left_out": len(task.left_out), "first_left_out": list(task.left_out[:3])}


def base_model_path(recipe: Recipe, run: RunDirectory, task: Task) -> Path | str:
    """The model SFT starts from; a from-scratch one is built the first time it is asked for."""
    if recipe.model.from_scratch is None:
        return recipe.model.model_name_or_path
    texts = [text for column in ("prompt", "completion") for text in map(plain_text, task.train[column])]
    return build_from_scratch(recipe.model.from_scratch, texts, recipe.seed, run.base)


def plain_text(value: object) -> str:
    """The text of a prompt or completion, chat messages joined by newlines."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def sft_model_path(recipe: Recipe, run: RunDirectory) -> Path | str:
    """The SFT model PPO starts from and is compared with."""
    return recipe.ppo.sft_model_path if recipe.sft_is_external else run.sft


def reward_model_path(recipe: Recipe, run: RunDirectory) -> Path | str:
    """The learned reward that pays PPO: a reward stage's folder, or a classifier."""
    return recipe.ppo.reward_model_path if recipe.reward_is_external else run.reward


def learned_reward(
    recipe: Recipe, run: RunDirectory, task: Task, tokenizer: PreTrainedTokenizerBase
) -> AdapterReward | ClassifierReward | None:
    """The function of the reward `learned`, if the recipe has one; an adapter's still has to be attached.

    Raises:
        ValueError: no finished reward model, one that PPO must not trust, or no classifier with one output.
    """
    config = recipe.ppo.learned_reward if recipe.ppo else None
    if config is None:
        return None
    path = reward_model_path(recipe, run)
    reward = load_learned_reward(path, recipe.model, tokenizer, recipe.min_accuracy, config.options)
    if isinstance(reward, ClassifierReward):
        reward.to(PartialState().device)
        if not is_reward_folder(path):
            say(f"{path}: a classifier that no reward stage has judged, so its accuracy is unknown")
            first = task.prompts[:CALIBRATION_ROWS]
            reward_on_references(reward, first["prompt"], [references[0] for references in first["references"]])
    return reward


def limit_kernel_cache() -> None:
    """Let oneDNN keep fewer compiled kernels: in bf16 on a CPU, one for each shape of a product.

    It keeps 1024, which are hundreds of megabytes, and texts have new lengths in every batch. One PPO update uses some
    80 again and again. Read when the first product runs; a value that is set already stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def quiet_libraries() -> None:
    """Leave the screen to what matters: loading and tokenising bars of a second are not it."""
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Renamings between trl and transformers, which a user of neither can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
