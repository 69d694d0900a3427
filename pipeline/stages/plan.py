"""The plan of a run: which of its stages run, continue or are skipped, why, and how that is shown."""

import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import SFTConfig

from pipeline.evaluation.config import BASELINES, CONTROL, SFT_BY_METRIC
from pipeline.recipe import Recipe, RecipeError
from pipeline.recipe.document import Document
from pipeline.recipe.model_checks import model_notes
from pipeline.runtime.devices import APPLE_GPU_IDLE, has_accelerator, has_apple_gpu
from pipeline.stages.control import control_problem, control_run
from pipeline.stages.directory import STAGES, RunDirectory, script_of, stage_option
from pipeline.stages.fingerprint import needed_stages, setting_differences, stage_status
from pipeline.stages.ppo_plan import ppo_choices, ppo_notes
from pipeline.stages.task import choose_prompts
from pipeline.tasks import TaskError
from pipeline.tasks.augment import growth_factor
from pipeline.tasks.counts import count_examples
from pipeline.trainers.ppo.algorithms import describe_algorithm

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


def plan_stages(recipe: Recipe, only: str | None, start: str | None, force: bool) -> list[PlannedStage]:
    """Decide what to do with each stage, in order; one that only some recipes have is left out of the plan of others.

    Raises:
        RecipeError: a stage is asked for that this recipe does not have.
    """
    absent = not_needed(recipe)
    chosen = [only] if only else STAGES[STAGES.index(start) if start else 0 :]
    if (only or start) in absent:
        raise RecipeError(f"{only or start}: this recipe does not run that stage: {absent[only or start]}")
    run, plan = RunDirectory.of(recipe), []
    hidden = {"reward": recipe.reward is None, CONTROL: not recipe.control}
    hidden |= {name: name not in recipe.eval.baselines for name in BASELINES}
    for stage in STAGES:
        if hidden.get(stage):
            continue
        if stage in absent:
            plan.append(PlannedStage(stage, "not needed", absent[stage]))
        elif stage not in chosen:
            plan.append(PlannedStage(stage, "not selected", f"--only {only}" if only else f"--from {start}"))
        else:
            made_again = {planned.stage for planned in plan if planned.action == "run"}
            plan.append(plan_stage(run, recipe, stage, force, made_again))
    return plan


def not_needed(recipe: Recipe) -> dict[str, str]:
    """Return the stages that a recipe does not run, with the reason."""
    absent = {}
    if recipe.sft_is_external:
        absent["sft"] = f"ppo.sft_model_path is {recipe.ppo.sft_model_path}"
    if not recipe.sft.needed:
        absent["sft"] = "the recipe has no sft section, and nothing in it reads an SFT model"
    if recipe.reward is None:
        absent["reward"] = "the recipe has no reward section"
    elif recipe.reward_is_external:
        absent["reward"] = f"ppo.reward_model_path is {recipe.ppo.reward_model_path}"
    if recipe.ppo is None:
        absent["ppo"] = "the recipe has no ppo section"
    if not recipe.control:
        absent[CONTROL] = "the recipe does not say control: true"
    for name in BASELINES:
        if name not in recipe.eval.baselines:
            absent[name] = "it is not in eval.baselines"
    return absent


def plan_stage(
    run: RunDirectory, recipe: Recipe, stage: str, force: bool, made_again: Collection[str] = ()
) -> PlannedStage:
    """Decide what to do with a selected stage. One that reads a stage which is `made_again` counts as changed."""
    status = stage_status(run, recipe, stage)
    if status == "absent":
        return PlannedStage(stage, "run", "not started yet")
    outdated = [f"{name}: made again" for name in needed_stages(recipe, stage) if name in made_again]
    if status == "changed" or outdated:
        differences = setting_differences(run, recipe, stage) or outdated
        more = [f"and {len(differences) - SHOWN_DIFFERENCES} more"] if len(differences) > SHOWN_DIFFERENCES else []
        changes = "; ".join([*differences[:SHOWN_DIFFERENCES], *more])
        return PlannedStage(stage, "run", f"changed since {run.stage(stage)} was made: {changes}", replaces=True)
    if force:
        return PlannedStage(stage, "run", "--force", replaces=True)
    if status == "partial":
        return PlannedStage(stage, "resume", "interrupted with the same settings")
    return PlannedStage(stage, "skip", "complete and unchanged")


def missing_input(recipe: Recipe, stage: str) -> str | None:
    """Return why a stage cannot start yet, with the command that makes what it lacks; None if it can."""
    run = RunDirectory.of(recipe)
    for name in needed_stages(recipe, stage):
        status = stage_status(run, recipe, name)
        if status == "complete":
            continue
        problem = f"no finished {name} stage in {run.stage(name)}"
        if status == "changed":
            differences = "; ".join(setting_differences(run, recipe, name)[:3])
            problem = f"the {name} stage in {run.stage(name)} was made with other settings ({differences})"
        return f"{stage}: {problem}; run: {typed_command(recipe, name)}"
    control = control_run(recipe) if stage == "eval" else None
    problem = control_problem(recipe, control) if control is not None else None
    return f"eval: eval.control: {str(control)!r} {problem}" if problem else None


def typed_command(recipe: Recipe, stage: str) -> str:
    """Return the command that a user types to run one stage of a recipe: by its script at the top of a clone."""
    source = recipe.source
    recipe_file = str(RunDirectory.of(recipe).path / "recipe.yaml")
    arguments = [recipe_file] if source is None else [source.file, *source.overrides]
    script = f"pipeline/{script_of(stage)}.py"
    if not Path(script).is_file():
        return shlex.join(["relay", "run", *arguments, "--only", stage])
    return shlex.join(["accelerate", "launch", script, *arguments, *stage_option(stage)])


def show_plan(
    console: Console, recipe: Recipe, plan: Sequence[PlannedStage], processes: int, options: Sequence[str]
) -> None:
    """Print stages, device and batch arithmetic."""
    source = recipe.source.file if recipe.source else recipe.name
    print_line(console, f"{source} -> {RunDirectory.of(recipe).path}")
    print_line(console, f"{device_name(options)}, {count(processes, 'process', 'processes')}")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for planned in plan:
        table.add_row(*map(Text, (planned.stage, planned.action, planned.reason)))
    console.print(table)
    launched = {planned.stage for planned in plan if planned.launches}
    if launched and (prompts := prompts_line(recipe)):
        print_line(console, prompts)
    for stage, sizes in (("sft", sft_sizes), ("ppo", ppo_sizes), (CONTROL, ppo_sizes), (SFT_BY_METRIC, sft_sizes)):
        if stage in launched:
            print_line(console, f"{stage}: {sizes(recipe, processes)}")
    notes = model_notes(recipe) if launched - {"eval"} else []
    if "ppo" in launched:
        print_line(console, f"ppo: {ppo_choices(recipe)}")
        notes += ppo_notes(recipe.ppo, recipe.eval.metrics[0].name)
    for note in notes:
        print_line(console, note)


def prompts_line(recipe: Recipe) -> str | None:
    """Say whether the plain prompts of the task become chats; None where the task's own rows or a stage decide.

    Raises:
        RecipeError: the recipe asks for what the model's tokenizer cannot do.
    """
    try:
        choice = choose_prompts(recipe)
    except TaskError as error:
        raise (recipe.source or Document("recipe")).restate(error) from error
    except ValueError:  # a tokenizer that cannot be read: the stage that needs it says so
        return None
    return None if choice is None else f"prompts: {choice.reason}"


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: paths are not wrapped, and brackets in them are no markup."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def device_name(options: Sequence[str]) -> str:
    """Return the name of the device the stages run on."""
    if "--cpu" in options or not has_accelerator():
        threads = f"cpu with {count(torch.get_num_threads(), 'thread', 'threads')}"
        return f"{threads}; {APPLE_GPU_IDLE}" if has_apple_gpu() else threads
    kind = torch.accelerator.current_accelerator().type
    return torch.cuda.get_device_name(0) if kind == "cuda" else kind


def sft_sizes(recipe: Recipe, processes: int) -> str:
    """Describe batch and steps of SFT; the number of steps where the number of examples is known."""
    arguments = {f: getattr(SFTConfig, f) for f in ("max_steps", "num_train_epochs", "gradient_accumulation_steps")}
    arguments |= {"per_device_train_batch_size": SFTConfig.per_device_train_batch_size, **recipe.sft.arguments}
    per_device, accumulation = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    batch = f"batch {per_device} per device x {accumulation} accumulated x {processes} = "
    batch += f"{per_device * accumulation * processes}"
    examples, factor = count_examples(recipe.task.config).sft, growth_factor(recipe.augment)
    batch += training_examples_text(recipe, examples)
    examples = None if None in (examples, factor) or recipe.sft.best_of_n is not None else examples * factor
    if arguments["max_steps"] > 0:
        return f"{batch}; {optimizer_steps(arguments['max_steps'])}"
    epochs = f"{arguments['num_train_epochs']:g} epoch{'' if arguments['num_train_epochs'] == 1 else 's'}"
    if examples is None or arguments.get("packing"):
        return f"{batch}; {epochs}"
    micro_batches = math.ceil(examples / (per_device * processes))
    steps = math.ceil(math.ceil(micro_batches / accumulation) * arguments["num_train_epochs"])
    return f"{examples} examples, {batch}; {epochs}, {optimizer_steps(steps)}"


def training_examples_text(recipe: Recipe, examples: int | None) -> str:
    """Say what SFT's training examples are made of; an empty text where they are those of the data."""
    lines = []
    if recipe.sft.best_of_n is not None:
        lines.append(f"; completions are the best of {recipe.sft.best_of_n.samples} samples by ppo.rewards")
    if recipe.augment:
        names = ", ".join(step.name for step in recipe.augment)
        factor, each = growth_factor(recipe.augment), "each example" if examples is None else f"each of {examples}"
        lines.append(f"; {names} makes {'what it returns' if factor is None else f'{factor} examples'} of {each}")
    return "".join(lines)


def ppo_sizes(recipe: Recipe, processes: int) -> str:
    """Describe batch > mini-batch > micro-batch and the steps of PPO."""
    ppo = recipe.ppo
    batch = ppo.batch_size(processes)
    algorithm = "" if ppo.algorithm is None else f"algorithm {describe_algorithm(ppo)}; "
    return (
        f"{algorithm}batch "
        f"{ppo.per_device_train_batch_size} per device x {ppo.gradient_accumulation_steps} accumulated x "
        f"{processes} = {batch} episodes, mini-batch {batch // ppo.num_mini_batches}, micro-batch "
        f"{ppo.per_device_train_batch_size} per device; {count(ppo.num_steps(processes), 'step', 'steps')} of "
        f"{count(ppo.num_ppo_epochs, 'PPO epoch', 'PPO epochs')}, "
        + optimizer_steps(ppo.num_optimizer_steps(processes))
    )


def optimizer_steps(number: int) -> str:
    """Return `1 optimizer step` or `3 optimizer steps`."""
    return count(number, "optimizer step", "optimizer steps")


def count(number: int, one: str, many: str) -> str:
    """Return `1 step` or `3 steps`."""
    return f"{number} {one if number == 1 else many}"
