"""Tell which keys of a recipe hold text, so that an override of such a key is taken as it is written."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl import RewardConfig, SFTConfig

from pipeline.recipe.build import SECTIONS
from pipeline.recipe.document import Document, KeyPath
from pipeline.tasks import TaskError, task_module

TOP_LEVEL_TEXT = ("name", "output_dir")


def is_text_key(path: KeyPath, document: Document) -> bool:
    """Tell whether the value at `path` can be nothing but text, or null."""
    if len(path) == 1:
        return path[0] in TOP_LEVEL_TEXT
    types = {kind for cls in _section_classes(path[0], path, document) for kind in _types(cls, path[1:])}
    return str in types and types <= {str, NoneType}


def _section_classes(section: str | int, path: KeyPath, document: Document) -> list[type]:
    """Return the dataclasses that hold the keys of a section."""
    if section == "task":
        return [] if path == ("task", "name") else _task_config(document)
    if section == "sft":
        return [SFTConfig]
    return [SECTIONS[section], *([RewardConfig] if section == "reward" else [])] if section in SECTIONS else []


def _task_config(document: Document) -> list[type]:
    """Return the `Config` of the recipe's task; none where the task is not known, which is refused later."""
    task = document.data.get("task")
    name = task.get("name") if isinstance(task, dict) else None
    try:
        config = getattr(task_module(document.with_code(name)), "Config", None) if isinstance(name, str) else None
    except TaskError:
        return []
    return [config] if dataclasses.is_dataclass(config) else []


def _types(annotation: Any, path: KeyPath) -> set[Any]:
    """Return the types that a value may have at `path` inside a value of the annotated type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return {kind for option in arguments for kind in _types(option, path)}
    if not path:
        return {annotation}
    if dataclasses.is_dataclass(annotation):
        hints = get_type_hints(annotation)
        return _types(hints[path[0]], path[1:]) if path[0] in hints else set()
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _types(arguments[1], path[1:])
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _types(arguments[0], path[1:])
    return {Any} if annotation is Any else set()
