"""All stages of a recipe one after the other, once or once for each of several seeds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.evaluation.pages.runs_pages import write_comparison
from pipeline.recipe import Recipe, RecipeError, load_checked_recipe, load_recipe
from pipeline.runtime.messages import one_line
from pipeline.stages.directory import RunDirectory
from pipeline.stages.engines import engine_problem
from pipeline.stages.launch import (
    StageError,
    default_launch_options,
    launch_stage,
    machine_rank,
    process_count,
    sharding_engine,
)
from pipeline.stages.plan import PlannedStage, missing_input, plan_stages, print_line, show_plan
from pipeline.stages.sharding_plan import sharding_line


@dataclass(frozen=True)
class Selection:
    """Which stages to run: one alone or all from one on; whether those that are done run again, or nothing runs."""

    only: str | None = None
    start: str | None = None
    force: bool = False
    dry_run: bool = False


def run_chain(
    path: Path, overrides: Sequence[str], selection: Selection, options: Sequence[str], is_kept: bool = True
) -> int:
    """Run the stages of one recipe, each with these options of accelerate launch; return the exit code.

    The report of a run whose directory is not kept is not named.
    """
    console = Console(highlight=False)
    try:
        options = options or default_launch_options()
        processes = process_count(options)
        recipe = load_checked_recipe(path, overrides, processes)
        plan = plan_stages(recipe, selection.only, selection.start, selection.force)
        show_plan(console, recipe, plan, processes, options)
        launched = [planned.stage for planned in plan if planned.launches]
        if "ppo" in launched and sharding_engine(options) == "FSDP":
            print_line(console, f"ppo: {sharding_line(recipe, processes)}")
        if problem := launch_problem(recipe, plan, options):
            raise RecipeError(problem)
        if selection.dry_run:
            return 0
        for planned in plan:
            if planned.launches:
                launch_stage(console, recipe, planned, path, overrides, options)
    except (RecipeError, FileNotFoundError) as error:
        return fail(str(error), 2)
    except StageError as error:
        return fail(str(error), error.exit_code)
    if is_kept and plan[-1].action != "not selected":
        print_line(console, f"report: {RunDirectory.of(recipe).eval / 'report.html'}")
    return 0


def launch_problem(recipe: Recipe, plan: Sequence[PlannedStage], options: Sequence[str]) -> str | None:
    """Return why the planned stages cannot be launched, or None if they can."""
    stages, engine = [planned.stage for planned in plan if planned.launches], sharding_engine(options)
    in_4_bits = recipe.model.load_in_4bit
    refused = next((problem for stage in stages if (problem := engine_problem(stage, engine, in_4_bits))), None)
    return refused or (missing_input(recipe, stages[0]) if stages else None)


def run_seeds(
    seeds: Sequence[int], path: Path, overrides: Sequence[str], selection: Selection, options: Sequence[str]
) -> int:
    """Run the chain once for each seed, in `<name>-seed-<n>`, then compare the runs in `<name>-seeds`."""
    try:
        name = load_recipe(path, overrides).name
    except (RecipeError, FileNotFoundError) as error:
        return fail(str(error), 2)
    for seed in seeds:
        if code := run_chain(path, [*overrides, f"seed={seed}", f"name={name}-seed-{seed}"], selection, options):
            return code
    if selection.dry_run or selection.only not in (None, "eval") or (options and machine_rank(options)):
        return 0
    root = RunDirectory.of(load_recipe(path, overrides)).path.parent
    try:
        write_comparison([root / f"{name}-seed-{seed}" for seed in seeds], root / f"{name}-seeds")
    except ValueError as error:
        return fail(str(error), 1)
    return 0


def fail(message: str, code: int) -> int:
    """Print on stderr what is wrong; return the exit code."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return code
