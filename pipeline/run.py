"""The whole chain of one recipe: what is done and unchanged is skipped, what was interrupted continues.

python pipeline/run.py recipes/quickstart.yaml sft.num_train_epochs=2
python pipeline/run.py recipes/quickstart.yaml --dry-run
python pipeline/run.py recipes/quickstart.yaml --from ppo -- --num_processes 1
python pipeline/run.py recipes/quickstart.yaml --seeds 0,1,2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import SFTConfig

from pipeline.evaluation.pages.runs_pages import write_comparison
from pipeline.recipe import Recipe, RecipeError, load_checked_recipe, load_recipe, split_recipe_argument
from pipeline.runtime.messages import one_line
from pipeline.stages.directory import (
    STAGES,
    RunDirectory,
    missing_input,
    set_aside,
    setting_differences,
    stage_status,
)
from pipeline.stages.first_failure import CAUSE_FILE
from pipeline.stages.launch import (
    default_launch_options,
    engine_problem,
    launch,
    machine_rank,
    process_count,
    sharding_engine,
    signal_name,
)
from pipeline.stages.lock import RunInUseError, run_lock
from pipeline.tasks.counts import count_examples

SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class PlannedStage:
    """What happens to one stage, and why; `replaces` says that an earlier result is set aside first."""

    stage: str
    action: str  # "run", "resume", "skip", "not needed" or "not selected"
    reason: str
    replaces: bool = False

    @property
    def launches(self) -> bool:
        """Whether a process group is started for it."""
        return self.action in ("run", "resume")


def main(argv: Sequence[str]) -> int:
    """Run the chain; 0 when its stages are complete, 2 when they cannot start, else the failed one's exit code."""
    arguments, options = parse_arguments(argv)
    path, overrides = split_recipe_argument(arguments.words)
    console = Console(highlight=False)
    if arguments.seeds is None:
        return run_chain(console, path, overrides, arguments, options)
    return run_seeds(console, path, overrides, arguments, options)


def run_seeds(
    console: Console, path: Path, overrides: Sequence[str], arguments: argparse.Namespace, options: Sequence[str]
) -> int:
    """The chain once for each seed, in `<name>-seed-<n>`, then their comparison in `<name>-seeds`."""
    try:
        name = load_recipe(path, overrides).name
    except (RecipeError, FileNotFoundError) as error:
        return fail(str(error), 2)
    for seed in arguments.seeds:
        code = run_chain(console, path, [*overrides, f"seed={seed}", f"name={name}-seed-{seed}"], arguments, options)
        if code:
            return code
    if arguments.dry_run or arguments.only not in (None, "eval") or (options and machine_rank(options)):
        return 0
    root = RunDirectory.of(load_recipe(path, overrides)).path.parent
    try:
        write_comparison([root / f"{name}-seed-{seed}" for seed in arguments.seeds], root / f"{name}-seeds")
    except ValueError as error:
        return fail(str(error), 1)
    return 0


def run_chain(
    console: Console, path: Path, overrides: Sequence[str], arguments: argparse.Namespace, options: Sequence[str]
) -> int:
    """The chain of one recipe; the exit code of the program."""
    try:
        options = options or default_launch_options()
        processes = process_count(options)
        recipe = load_checked_recipe(path, overrides, processes)
        plan = plan_stages(recipe, arguments.only, arguments.start, arguments.force)
    except (RecipeError, FileNotFoundError) as error:
        return fail(str(error), 2)
    show_plan(console, recipe, plan, processes, options)
    launched, engine = [p.stage for p in plan if p.launches], sharding_engine(options)
    problem = next((refusal for stage in launched if (refusal := engine_problem(stage, engine))), None)
    problem = problem or (missing_input(recipe, launched[0]) if launched else None)
    if problem:
        return fail(problem, 2)
    if arguments.dry_run:
        return 0
    for planned in plan:
        if planned.launches:
            command = stage_command(planned.stage, path, overrides, options)
            code = run_stage(console, recipe, planned, command, leads=machine_rank(options) == 0)
            if code:
                return code
    report = RunDirectory.of(recipe).eval / "report.html"
    if plan[-1].action != "not selected":
        say(console, f"report: {report}")
    return 0


def seed_list(text: str) -> list[int]:
    """`0,1,2` as numbers, two or more, none twice.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    words = text.split(",")
    if len(words) < 2 or len(set(words)) != len(words) or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected two or more different whole numbers such as 0,1,2, found {text!r}")
    return [int(word) for word in words]


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what stands after `--`: the options of accelerate launch."""
    own, options = list(argv), []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.usage = "%(prog)s [RECIPE] [section.key=value ...] [options] [-- accelerate launch options]"
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE section.key=value", help="a YAML file, and values that replace its own"
    )
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--only", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    selection.add_argument(
        "--from", choices=STAGES, metavar="STAGE", dest="start", help="this stage and those after it"
    )
    parser.add_argument("--seeds", type=seed_list, metavar="N,N,...", help="run once for each seed and sum up")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--force", action="store_true", help="run the selected stages again, keeping what they made")
    return parser.parse_intermixed_args(own), options


def plan_stages(recipe: Recipe, only: str | None, start: str | None, force: bool) -> list[PlannedStage]:
    """What to do with each stage, in order.

    Raises:
        RecipeError: a stage is asked for that this recipe does not have.
    """
    absent = not_needed(recipe)
    chosen = [only] if only else STAGES[STAGES.index(start) if start else 0 :]
    if (only or start) in absent:
        raise RecipeError(f"{only or start}: this recipe does not run that stage: {absent[only or start]}")
    directory, plan = RunDirectory.of(recipe), []
    for stage in STAGES:
        if stage == "reward" and recipe.reward is None:
            continue  # nothing is said of a stage that nobody asked for
        if stage in absent:
            plan.append(PlannedStage(stage, "not needed", absent[stage]))
        elif stage not in chosen:
            plan.append(PlannedStage(stage, "not selected", f"--only {only}" if only else f"--from {start}"))
        else:
            plan.append(plan_stage(directory, recipe, stage, force))
    return plan


def not_needed(recipe: Recipe) -> dict[str, str]:
    """The stages a recipe does not run, with the reason."""
    absent = {}
    if recipe.sft_is_external:
        absent["sft"] = f"ppo.sft_model_path is {recipe.ppo.sft_model_path}"
    if recipe.reward is None:
        absent["reward"] = "the recipe has no reward section"
    elif recipe.reward_is_external:
        absent["reward"] = f"ppo.reward_model_path is {recipe.ppo.reward_model_path}"
    if recipe.ppo is None:
        absent["ppo"] = "the recipe has no ppo section"
    return absent


def plan_stage(directory: RunDirectory, recipe: Recipe, stage: str, force: bool) -> PlannedStage:
    """What to do with a selected stage. One that stands on a stage that is made again counts as changed."""
    status, place = stage_status(directory, recipe, stage), directory.stage(stage)
    if status == "absent":
        return PlannedStage(stage, "run", "not started yet")
    if status == "changed":
        differences = setting_differences(directory, recipe, stage)
        more = [f"and {len(differences) - SHOWN_DIFFERENCES} more"] if len(differences) > SHOWN_DIFFERENCES else []
        changes = "; ".join([*differences[:SHOWN_DIFFERENCES], *more])
        return PlannedStage(stage, "run", f"changed since {place} was made: {changes}", replaces=True)
    if force:
        return PlannedStage(stage, "run", "--force", replaces=True)
    if status == "partial":
        return PlannedStage(stage, "resume", "interrupted with the same settings")
    return PlannedStage(stage, "skip", "complete and unchanged")


def show_plan(
    console: Console, recipe: Recipe, plan: Sequence[PlannedStage], processes: int, options: Sequence[str]
) -> None:
    """Print stages, device and batch arithmetic."""
    source = recipe.source.file if recipe.source else recipe.name
    say(console, f"{source} -> {RunDirectory.of(recipe).path}")
    say(console, f"{device_name(options)}, {count(processes, 'process', 'processes')}")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for planned in plan:
        table.add_row(*map(Text, (planned.stage, planned.action, planned.reason)))
    console.print(table)
    launched = {p.stage for p in plan if p.launches}
    sizes = {"sft": sft_sizes, "ppo": ppo_sizes}
    for stage in ("sft", "ppo"):
        if stage in launched:
            say(console, f"{stage}: {sizes[stage](recipe, processes)}")


def device_name(options: Sequence[str]) -> str:
    """The device the stages run on."""
    if "--cpu" in options or not torch.accelerator.is_available():
        return f"cpu with {count(torch.get_num_threads(), 'thread', 'threads')}"
    kind = torch.accelerator.current_accelerator().type
    return torch.cuda.get_device_name(0) if kind == "cuda" else kind


def sft_sizes(recipe: Recipe, processes: int) -> str:
    """Batch and steps of SFT; the number of steps where the number of examples is known."""
    arguments = {f: getattr(SFTConfig, f) for f in ("max_steps", "num_train_epochs", "gradient_accumulation_steps")}
    arguments |= {"per_device_train_batch_size": SFTConfig.per_device_train_batch_size, **recipe.sft.arguments}
    per_device, accumulation = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    batch = f"batch {per_device} per device x {accumulation} accumulated x {processes} = "
    batch += f"{per_device * accumulation * processes}"
    examples = count_examples(recipe.task.config).sft
    if arguments["max_steps"] > 0:
        return f"{batch}; {arguments['max_steps']} optimizer steps"
    epochs = f"{arguments['num_train_epochs']:g} epoch{'' if arguments['num_train_epochs'] == 1 else 's'}"
    if examples is None or arguments.get("packing"):
        return f"{batch}; {epochs}"
    micro_batches = math.ceil(examples / (per_device * processes))
    steps = math.ceil(math.ceil(micro_batches / accumulation) * arguments["num_train_epochs"])
    return f"{examples} examples, {batch}; {epochs}, {steps} optimizer steps"


def ppo_sizes(recipe: Recipe, processes: int) -> str:
    """Batch > mini-batch > micro-batch and the steps of PPO."""
    ppo = recipe.ppo
    batch = ppo.batch_size(processes)
    return (
        f"batch {ppo.per_device_train_batch_size} per device x {ppo.gradient_accumulation_steps} accumulated x "
        f"{processes} = {batch} episodes, mini-batch {batch // ppo.num_mini_batches}, micro-batch "
        f"{ppo.per_device_train_batch_size} per device; {count(ppo.num_steps(processes), 'step', 'steps')} of "
        f"{count(ppo.num_ppo_epochs, 'PPO epoch', 'PPO epochs')}, "
        f"{ppo.num_optimizer_steps(processes)} optimizer steps"
    )


def stage_command(stage: str, recipe: Path, overrides: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command of one stage's process group."""
    script = Path(__file__).resolve().parent / f"{stage}.py"
    # Not accelerate itself: its own traceback would bury what the stage has said went wrong.
    launcher = [sys.executable, "-m", "pipeline.stages.first_failure"]
    return [*launcher, *options, str(script), str(recipe), *overrides]


def run_stage(
    console: Console, recipe: Recipe, planned: PlannedStage, command: Sequence[str], leads: bool = True
) -> int:
    """Launch a stage and see it through; 0 if it is complete afterwards.

    Of several machines, on each of which this program runs, one `leads`: a stage begins when all have launched it.
    """
    directory, stage = RunDirectory.of(recipe), planned.stage
    place = directory.stage(stage)
    try:
        if leads:
            with run_lock(directory.path):  # the stage itself holds it later
                if planned.replaces and place.exists():
                    say(console, f"{stage}: what was in {place} is kept in {set_aside(place)}")
    except (RunInUseError, OSError) as error:
        return fail(f"{stage}: {error}" if isinstance(error, OSError) else str(error), 2)
    say(console, f"{stage}: {'continuing' if planned.action == 'resume' else 'starting'}", style="bold")
    began = time.monotonic()
    code, cause = launch_and_ask(command)
    if code > 128 and signal_name(code - 128):
        return fail(f"{stage} was ended by {signal_name(code - 128)}; the same command continues there{cause}", code)
    if code:
        return fail(f"{stage} failed with exit code {code}; the same command continues there{cause}", code)
    if leads and stage_status(directory, recipe, stage) != "complete":  # others may see the record later
        return fail(f"{stage} ended without finishing {place}; the same command continues there", 1)
    say(console, f"{stage}: done in {time.monotonic() - began:.0f} s")
    return 0


def launch_and_ask(command: Sequence[str]) -> tuple[int, str]:
    """Launch a stage; its exit code, and which of several processes failed first and why, as the end of a sentence."""
    with tempfile.TemporaryDirectory() as place:
        os.environ[CAUSE_FILE] = str(Path(place) / "cause")
        code = launch(command)
        file = Path(os.environ.pop(CAUSE_FILE))
        cause = " ".join(file.read_text(encoding="utf-8").split()) if file.is_file() else ""
    return code, f": {cause}" if cause else ""


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: paths are not wrapped, and brackets in them are no markup."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def count(number: int, one: str, many: str) -> str:
    """`1 step` or `3 steps`."""
    return f"{number} {one if number == 1 else many}"


def fail(message: str, code: int) -> int:
    """Say what is wrong on stderr; returns the exit code."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
