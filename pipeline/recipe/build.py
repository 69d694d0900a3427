"""Plain recipe values -> the packages' own dataclasses, by pydantic; errors name the key and where it is written."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from trl import SFTConfig

from pipeline.evaluation.config import EvalConfig
from pipeline.models.config import ModelConfig
from pipeline.recipe.document import Document, KeyPath, RecipeError
from pipeline.recipe.refused import REFUSED_SFT_KEYS
from pipeline.recipe.types import RewardSection
from pipeline.runtime.messages import did_you_mean
from pipeline.trainers.ppo.config import PPOConfig

TOP_LEVEL = ("name", "seed", "output_dir", "control", "model", "task", "sft", "reward", "ppo", "eval")
SECTIONS = {"model": ModelConfig, "sft": SFTConfig, "reward": RewardSection, "ppo": PPOConfig, "eval": EvalConfig}
# What pydantic expected, by the type of its error.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "dataclass_type": "a mapping",
}


def build_section(cls: type, values: object, path: KeyPath, document: Document) -> Any:
    """Make an instance of the dataclass `cls` from the mapping at `path`; null stands for an empty mapping.

    Raises:
        RecipeError: not a mapping, an unknown or missing key, a wrong type, or a value that the class itself refuses.
    """
    values = as_mapping(values, path, document)
    _check_nested_keys(cls, values, path, document)
    return convert(values, cls, path, document)


def as_mapping(values: object, path: KeyPath, document: Document) -> dict[str, Any]:
    """Return a section as a mapping; null stands for an empty one."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise document.error(path, f"expected a section of keys, found {shown(values)}")
    return values


def check_keys(values: Mapping[str, Any], known: Iterable[str], path: KeyPath, document: Document) -> None:
    """Refuse the first key that is not known, and name the section that has it or the key that was meant."""
    known = list(known)
    for key in values:
        if key not in known:
            raise document.unknown((*path, key), f"unknown key{_suggestion(key, known)}")


def _check_nested_keys(annotation: Any, value: object, path: KeyPath, document: Document) -> None:
    """Refuse unknown keys of a dataclass and of those inside it."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            for option in get_args(annotation):
                _check_nested_keys(option, item, (*path, index), document)
    elif isinstance(value, dict) and is_dataclass(annotation):
        hints = get_type_hints(annotation)
        check_keys(value, (f.name for f in fields(annotation)), path, document)
        for key, item in value.items():
            _check_nested_keys(hints[key], item, (*path, key), document)
    else:
        for option in get_args(annotation):
            _check_nested_keys(option, value, path, document)


def _suggestion(key: str, known: list[str]) -> str:
    if key in TOP_LEVEL:
        return "; it is a key of the top level"
    owners = [name for name, cls in SECTIONS.items() if key in {f.name for f in fields(cls)} - {"arguments"}]
    if owners and key not in REFUSED_SFT_KEYS:
        return f"; it is a key of {' and of '.join(owners)}"
    return did_you_mean(key, known) or (f"; the keys here are {', '.join(known)}" if len(known) <= 12 else "")


def convert(value: object, annotation: Any, path: KeyPath, document: Document) -> Any:
    """Return a plain value as the annotated type: an int where a float is wanted, a list where a tuple is.

    The values of YAML are those of JSON, which pydantic reads strictly: no text becomes a number or true or false.

    Raises:
        RecipeError: a value of another type, which the message names with what was expected, or one that a dataclass
            refuses.
    """
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise _restate(error, value, path, document) from error


def _restate(error: ValidationError, value: object, path: KeyPath, document: Document) -> RecipeError:
    """Make the message of the problem that lies deepest in the value: a union has one for each of its members."""
    problems: dict[KeyPath, list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_key_path(problem, value), []).append(problem)
    key = max(problems, key=len)
    kinds = {problem["type"]: problem for problem in problems[key]}
    if "value_error" in kinds:
        return document.restate(kinds["value_error"]["ctx"]["error"], (*path, *key))
    if "missing" in kinds:
        return document.error((*path, *key), "missing: this key is needed")
    value = problems[key][0]["input"]
    expected = " or ".join(dict.fromkeys(_expected(problem) for problem in problems[key]))
    return document.error((*path, *key), f"expected {expected}, found {shown(value)}{_hint(kinds, value)}")


def _key_path(problem: Mapping[str, Any], value: object) -> KeyPath:
    """Return the keys and indices in the location of a problem, which also names members of unions."""
    path: KeyPath = ()
    for step in problem["loc"]:
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            path, value = (*path, step), value[step]
    return (*path, problem["loc"][-1]) if problem["type"] == "missing" else path


def _expected(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "literal_error":
        return f"one of {', '.join(_choices(problem))}"
    return EXPECTED.get(problem["type"], problem["msg"])


def _choices(problem: Mapping[str, Any]) -> list[str]:
    return re.findall("'([^']*)'", problem["ctx"]["expected"])


def _hint(kinds: Mapping[str, Mapping[str, Any]], value: object) -> str:
    match value:
        case float() if "int_type" in kinds and value.is_integer():
            return f"; write {int(value)}"
        case "yes" | "no" | "on" | "off" if "bool_type" in kinds:
            return "; YAML 1.2 has only true and false"
        case dict() if "string_type" in kinds:
            return '; put quotes around a text that has braces or ": " in it'
        case int() | float() if "string_type" in kinds:
            return "; put quotes around it"
        case str() if "literal_error" in kinds:
            return did_you_mean(value, _choices(kinds["literal_error"]))
    return ""


def shown(value: object) -> str:
    """Write a value as a recipe would have it, and only the kind of a list or mapping."""
    if isinstance(value, str):
        return repr(value if len(value) <= 200 else f"{value[:200]}...")
    kinds = {dict: "a mapping", list: "a list", bool: str(value).lower(), type(None): "null"}
    return kinds.get(type(value), str(value))
