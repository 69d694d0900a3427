"""Turn data into examples: prompt, completion, references. One file per kind of task, named like its recipe name."""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

from pipeline.tasks.types import SPLITS, Task, TaskError

TASK_NAMES = ("parallel", "columns")

__all__ = ["SPLITS", "TASK_NAMES", "Task", "TaskError", "load_task", "task_module"]


def task_module(name: str) -> ModuleType:
    """Return the module of a kind of task, with `Config` (its recipe keys), `files` and `load`.

    `name` is one of TASK_NAMES or the dotted path of a user's module with the same three.

    Raises:
        TaskError: no such kind.
    """
    if name in TASK_NAMES:
        return import_module(f"pipeline.tasks.{name}")
    if "." in name:
        try:
            return import_module(name)
        except Exception as error:  # a user's module may fail in any way
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise TaskError(f"task.name: cannot import {name!r} ({kind}{error})") from error
    raise TaskError(f"task.name: {name!r} is not one of {', '.join(TASK_NAMES)}, nor the dotted path of a module")


def load_task(name: str, config: object) -> Task:
    """Load the three splits of a task; `config` is an instance of `task_module(name).Config`.

    Raises:
        TaskError: a file, column or split is missing, empty or inconsistent; the message names it.
    """
    task = task_module(name).load(config)
    splits: Mapping[str, object] = {split: getattr(task, split) for split in SPLITS}
    for split, rows in splits.items():
        if len(rows) == 0:
            raise TaskError(f"task: the {split} split is empty")
    return task
