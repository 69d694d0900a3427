"""Rows of a task that a model cannot take: left out and counted, or refused."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.tasks import SPLITS, Task, TaskError


def splits_of(task: Task) -> Sequence[str]:
    """Name the splits that a task has, the rows that are kept for PPO included."""
    return SPLITS if task.ppo_prompts is None else (*SPLITS, "ppo_prompts")


def without_rows(task: Task, split: str, problems: Sequence[str | None], always: bool = False) -> Task:
    """Return the task without the rows of a split that have a problem, and with what says where they were.

    Raises:
        TaskError: there are some, and neither `always` nor `task.skip_broken_rows`; or there are no others.
    """
    broken = [row for row, problem in enumerate(problems) if problem is not None]
    if not broken:
        return task
    kept = [row for row, problem in enumerate(problems) if problem is None]
    skips = task.skip_broken_rows or always
    if not skips or not kept:
        alike = [row for row in broken if problems[row] == problems[broken[0]]]
        more = "" if skips else "; task.skip_broken_rows: true leaves out such rows"
        raise TaskError(f"task: {problems[broken[0]]}, in {task.where(split, alike)}{more}")
    lines = [f"{task.where(split, [row])}: {problems[row]}" for row in broken]
    places = {**task.places, split: lambda rows: task.where(split, [kept[row] for row in rows])}
    left_out = tuple(dict.fromkeys([*task.left_out, *lines]))
    return replace(task, **{split: getattr(task, split).select(kept)}, places=places, left_out=left_out)
