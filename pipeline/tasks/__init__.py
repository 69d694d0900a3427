"""Turn data into examples: prompt, completion, references. One file per kind of task, named like its recipe name."""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

from pipeline.runtime.user_code import UserCodeError, is_user_code, load_user_module, load_user_object
from pipeline.tasks.types import SPLITS, Task, TaskError

TASK_NAMES = ("parallel", "columns", "speech")

__all__ = ["SPLITS", "TASK_NAMES", "Task", "TaskError", "load_task", "task_module"]


def task_module(name: str) -> ModuleType:
    """Return the module of a kind of task, with `Config` (its recipe keys), `files` and `load`.

    `name` is one of TASK_NAMES, or `package.module` or `path/file.py` of the user with the same three; with `:thing`
    the thing in it has them.

    Raises:
        TaskError: no such kind.
    """
    if name in TASK_NAMES:
        return import_module(f"pipeline.tasks.{name}")
    if is_user_code(name):
        try:
            return load_user_object(name) if ":" in name else load_user_module(name)
        except UserCodeError as error:
            raise TaskError(f"task.name: {error}") from error
    raise TaskError(
        f"task.name: {name!r} is not one of {', '.join(TASK_NAMES)}, nor a module (package.module or path/file.py)"
    )


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
