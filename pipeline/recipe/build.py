"""Plain recipe values -> config dataclasses, refusing unknown keys, wrong types and options that would do nothing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import SFTConfig

from pipeline.evaluation.config import EvalConfig, MetricConfig
from pipeline.models.config import ModelConfig
from pipeline.recipe.document import Document, KeyPath
from pipeline.recipe.refused import (
    ACTS_ONLY_WITH,
    DEPRECATED_VALUES,
    LOW_RANK_OPTIMIZERS,
    OPTIMIZERS_WITHOUT_ARGS,
    REFUSED_SFT_KEYS,
    UPLOADS,
)
from pipeline.recipe.types import SFTSection
from pipeline.rewards.config import RewardConfig
from pipeline.runtime.messages import did_you_mean
from pipeline.trainers.huggingface.sft import DEFAULTS as SFT_DEFAULTS
from pipeline.trainers.ppo.config import PPOConfig

TOP_LEVEL = ("name", "seed", "output_dir", "model", "task", "sft", "reward", "ppo", "eval")


def build_section(cls: type, values: object, path: KeyPath, document: Document) -> Any:
    """An instance of the dataclass `cls` from the mapping at `path`; null stands for an empty mapping.

    Raises:
        RecipeError: not a mapping, an unknown or missing key, a wrong type, or a value the class itself refuses.
    """
    values = as_mapping(values, path, document)
    hints, known = get_type_hints(cls), fields(cls)
    check_keys(values, [f.name for f in known], path, document)
    arguments = {key: convert(value, hints[key], (*path, key), document) for key, value in values.items()}
    missing = [f.name for f in known if f.name not in arguments and _is_required(f)]
    if missing:
        raise document.error((*path, missing[0]), "missing: this key is needed")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise document.restate(error, path) from error


def as_mapping(values: object, path: KeyPath, document: Document) -> dict[str, Any]:
    """`values` as a mapping, an empty section being an empty one."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise document.error(path, f"expected a section of keys, found {_found(values)}")
    return values


def check_keys(values: Mapping[str, Any], known: Iterable[str], path: KeyPath, document: Document) -> None:
    """Refuse the first key that is not known, naming the section that has it or the key that was meant."""
    known = list(known)
    for key in values:
        if key not in known:
            raise document.error((*path, key), f"unknown key{_suggestion(key, known)}")


def _suggestion(key: str, known: list[str]) -> str:
    sections = {
        "the top level": TOP_LEVEL,
        "model": [f.name for f in fields(ModelConfig)],
        "sft": [name for name in sft_fields() if name not in REFUSED_SFT_KEYS],
        "reward": ["pairs", "model", "min_accuracy", "margin_weight"],
        "ppo": [f.name for f in fields(PPOConfig)],
        "eval": [f.name for f in fields(EvalConfig)],
    }
    owners = [section for section, keys in sections.items() if key in keys]
    if owners:
        return f"; it is a key of {' and of '.join(owners)}"
    few = f"; the keys here are {', '.join(known)}" if len(known) <= 12 else ""
    return did_you_mean(key, known) or few


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def build_sft_section(values: object, model: ModelConfig, document: Document) -> SFTSection:
    """The `sft:` section, checked against `trl.SFTConfig`'s fields without building one, which would touch devices.

    Sequences are cut to what a from-scratch model can read, unless `max_length` says less.

    Raises:
        RecipeError: a key SFTConfig lacks, one that Relay sets itself or that would do nothing, or a wrong type.
    """
    values, path = dict(as_mapping(values, ("sft",), document)), ("sft",)
    use_peft = values.pop("use_peft", model.use_peft and model.from_scratch is None)
    use_peft = convert(use_peft, bool, (*path, "use_peft"), document)
    arguments = convert_arguments("sft", values, SFTConfig, REFUSED_SFT_KEYS, ("use_peft",), document)
    refuse_conflicts("sft", arguments, SFTConfig, SFT_DEFAULTS, document)
    if model.from_scratch is not None and "max_length" not in arguments:
        arguments["max_length"] = min(SFTConfig.max_length, model.from_scratch.max_position_embeddings)
    return SFTSection(use_peft, arguments)


def convert_arguments(
    section: str,
    values: Mapping[str, Any],
    config_class: type,
    refused: Mapping[str, str],
    own: Iterable[str],
    document: Document,
) -> dict[str, Any]:
    """The keys of a section as arguments of a config class of TRL, without building one; `own` are keys of Relay.

    Raises:
        RecipeError: a key the class lacks, a refused one, a wrong type, or a value that is none of its choices.
    """
    for key in values:
        if key in refused or key.startswith(("hub_", "push_to_hub")):
            reason = refused.get(key, UPLOADS)
            raise document.error((section, key), f"this key of {config_class.__name__} is not for a recipe: {reason}")
    known = {f.name: f for f in fields(config_class)}
    check_keys(values, [*own, *(name for name in known if name not in refused)], (section,), document)
    hints = get_type_hints(config_class)
    arguments = {key: convert(value, hints[key], (section, key), document) for key, value in values.items()}
    for key, value in arguments.items():
        _check_choice(known[key], value, (section, key), document)
    return arguments


def sft_fields() -> dict[str, Field]:
    """The fields of `trl.SFTConfig` by name."""
    return {f.name: f for f in fields(SFTConfig)}


def _check_choice(field: Field, value: object, path: KeyPath, document: Document) -> None:
    refused = DEPRECATED_VALUES.get(field.name)
    choices = [choice for choice in field.metadata.get("choices") or () if choice != refused]
    if choices and value is not None and value not in choices:
        hint = did_you_mean(str(value), choices)
        raise document.error(path, f"expected one of {', '.join(choices)}, found {_found(value)}{hint}")


def refuse_conflicts(
    section: str,
    arguments: Mapping[str, Any],
    config_class: type,
    defaults: Mapping[str, Any],
    document: Document,
) -> None:
    """Refuse keys of a section that others make idle.

    Raises:
        RecipeError: naming both.
    """
    effective = {f.name: f.default for f in fields(config_class)} | dict(defaults) | dict(arguments)
    for key, (other, wanted) in ACTS_ONLY_WITH.items():
        if key in arguments and other in effective and effective[other] != wanted:
            raise document.error(
                (section, key),
                f"it would do nothing, because {other} is {_found(effective[other])}; "
                f"set {section}.{other}: {_plain(wanted)} or remove it",
            )
    if "num_train_epochs" in arguments and effective["max_steps"] > 0:
        raise document.error((section, "num_train_epochs"), "it would do nothing, because max_steps is set; keep one")
    optimizer = str(effective["optim"])
    if "optim_args" in arguments and optimizer in OPTIMIZERS_WITHOUT_ARGS:
        raise document.error(
            (section, "optim_args"), f"it would do nothing: {optimizer} reads none; set {section}.optim"
        )
    if "optim_target_modules" in arguments and not optimizer.startswith(LOW_RANK_OPTIMIZERS):
        rule = f"it would do nothing: only the optimizers of GaLore and APOLLO read it, and optim is {optimizer}"
        raise document.error((section, "optim_target_modules"), rule)
    reported = effective["report_to"] or []
    trackers = {reported} if isinstance(reported, str) else set(reported)
    if "run_name" in arguments and not trackers - {"none", "tensorboard"}:
        tracker = "tensorboard, which has no names of runs" if "tensorboard" in trackers else "none"
        raise document.error(
            (section, "run_name"), f"it would do nothing, because report_to is {tracker}; set {section}.report_to"
        )
    if "project" in arguments and not trackers & {"trackio", "all"}:
        raise document.error((section, "project"), "it would do nothing: only report_to: trackio reads it")
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in arguments and arguments.get(new) is not None:
            raise document.error((section, old), f"it would do nothing, because {new} is set too; keep one")


def convert(value: object, annotation: Any, path: KeyPath, document: Document) -> Any:
    """`value` as the annotated type: an int where a float is wanted, a list where a tuple is, never a bool for an int.

    Raises:
        RecipeError: it is of no such type; the message says what was expected and found.
    """
    options = list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]
    if any(_is_enum(option) for option in options):
        options = [option for option in options if option is not str]  # the enum says which texts are allowed
    for option in options:
        if _matches(value, option):
            return _converted(value, option, path, document)
    expected = " or ".join(_expected(option) for option in options)
    raise document.error(path, f"expected {expected}, found {_found(value)}{_hint(value, options)}")


def _is_enum(option: object) -> bool:
    return isinstance(option, type) and issubclass(option, Enum)


def _matches(value: object, option: Any) -> bool:
    origin = get_origin(option) or option
    if option is Any:
        return True
    if origin is Literal:
        return any(value is choice or (isinstance(choice, str) and value == choice) for choice in get_args(option))
    if option in (None, NoneType):
        return value is None
    if _is_enum(option):
        return value in [member.value for member in option]
    if option in (int, float):
        allowed = (int,) if option is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool) and not math.isnan(value)
    if origin in (list, tuple):
        return isinstance(value, list)
    if option in (RewardConfig, MetricConfig):
        return isinstance(value, str | dict)
    if origin in (dict, Mapping) or is_dataclass(option):
        return isinstance(value, dict)
    return isinstance(value, option)


def _converted(value: Any, option: Any, path: KeyPath, document: Document) -> Any:
    origin, arguments = get_origin(option) or option, get_args(option)
    if option is float:
        return float(value)
    if origin in (list, tuple):
        item = arguments[0] if arguments else Any
        return origin(convert(v, item, (*path, i), document) for i, v in enumerate(value))
    if option in (RewardConfig, MetricConfig):
        return _build_line(option, value, path, document)
    if origin in (dict, Mapping) and arguments:
        return {key: convert(v, arguments[1], (*path, key), document) for key, v in value.items()}
    return build_section(option, value, path, document) if is_dataclass(option) else value


def _build_line(cls: type, value: str | dict[str, Any], path: KeyPath, document: Document) -> Any:
    """A reward or metric: a name, or a mapping whose keys other than the class's own are its options."""
    values = {"name": value} if isinstance(value, str) else dict(value)
    own = [f.name for f in fields(cls)]
    given = as_mapping(values.pop("options", None), (*path, "options"), document)
    extra = {key: values.pop(key) for key in list(values) if key not in own}
    for key in extra:
        hint = did_you_mean(key, [name for name in own if name != "options" and name not in values])
        if hint:
            raise document.error(
                (*path, key), f"unknown key{hint} (an option of that name goes into options: {{{key}: ...}})"
            )
    return build_section(cls, {**values, "options": {**extra, **given}}, path, document)


def _expected(option: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    if option in names:
        return names[option]
    if _is_enum(option):
        return f"one of {', '.join(str(member.value) for member in option)}"
    if get_origin(option) is Literal:
        return " or ".join(_plain(choice) for choice in get_args(option))
    if option in (RewardConfig, MetricConfig):
        return "a name or a mapping with a name"
    return "a list" if (get_origin(option) or option) in (list, tuple) else "a mapping"


def _found(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 200 else f"{value[:200]}...")
    return {dict: "a mapping", list: "a list"}.get(type(value), _plain(value))


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _hint(value: object, options: list[Any]) -> str:
    if isinstance(value, float) and int in options and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str) and bool in options and value.lower() in ("yes", "no", "on", "off"):
        return "; YAML 1.2 has only true and false"
    if isinstance(value, dict) and str in options:
        return '; put quotes around a text that has braces or ": " in it'
    if isinstance(value, int | float) and str in options:
        return "; put quotes around it"
    enums = [str(member.value) for option in options if _is_enum(option) for member in option]
    return did_you_mean(value, enums) if isinstance(value, str) else ""
