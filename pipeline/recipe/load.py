"""One YAML file and overrides -> a typed Recipe, and back to plain values. Each package owns its section."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.config import EvalConfig, MetricConfig
from pipeline.models.config import ModelConfig
from pipeline.recipe.build import TOP_LEVEL, as_mapping, build_section, check_keys, convert, shown
from pipeline.recipe.document import Document, KeyPath, RecipeError
from pipeline.recipe.reader import read_document
from pipeline.recipe.refused import REFUSED_PPO_KEYS
from pipeline.recipe.trl_sections import (
    build_reward_section,
    build_sft_section,
    fill_lengths,
    reward_values,
    sft_values,
)
from pipeline.recipe.types import Recipe, TaskSection
from pipeline.rewards.config import RewardConfig
from pipeline.runtime.messages import did_you_mean
from pipeline.runtime.user_code import search_user_code
from pipeline.tasks import TASK_NAMES, task_module
from pipeline.trainers.ppo.algorithms import ALGORITHMS, expand_algorithm
from pipeline.trainers.ppo.config import PPOConfig


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe of a YAML file with `section.key=value` overrides laid over it.

    Only the text is checked here; `check_recipe` then looks at files, models, metrics and rewards.

    Raises:
        RecipeError: one sentence with the place, the key, what was found and, where there is one, the key meant.
    """
    search_user_code(Path(path).parent, Path.cwd())
    return build_recipe(read_document(path, overrides))


def load_stored_recipe(path: str | Path) -> Recipe:
    """Load the recipe that is saved with a run; one of an older version without the keys that no recipe has any more.

    It tells the names and paths of a finished run. What trains or evaluates reads recipes by `load_recipe`.

    Raises:
        RecipeError: as `load_recipe`, but for keys that no recipe has.
    """
    search_user_code(Path(path).parent, Path.cwd())
    document = read_document(path)
    while True:
        try:
            return build_recipe(document)
        except RecipeError as error:
            if error.unknown_key is None or not document.without(error.unknown_key):
                raise


def build_recipe(document: Document) -> Recipe:
    """Make a recipe of plain values.

    Raises:
        RecipeError: as `load_recipe`.
    """
    values = document.data
    check_keys(values, TOP_LEVEL, (), document)
    for section in ("name", "model", "task"):
        if values.get(section) is None:
            raise document.error((section,), "missing: this key is needed")
    scalars = {
        key: convert(values[key], kind, (key,), document)
        for key, kind in (("name", str), ("seed", int), ("output_dir", str), ("control", bool))
        if key in values
    }
    model = build_section(ModelConfig, _with_template(values["model"], document), ("model",), document)
    ppo = _build_ppo(values.get("ppo"), model, document)
    try:
        recipe = Recipe(
            **scalars,
            model=model,
            task=_build_task(values["task"], document),
            sft=build_sft_section(values.get("sft"), model, document),
            reward=build_reward_section(values["reward"], ppo, document) if "reward" in values else None,
            ppo=ppo,
            eval=_build_eval(values.get("eval"), ppo, document),
            source=document,
        )
        needed = "sft" in values or ppo is not None or recipe.reward is not None or recipe.evaluation_reads_sft
        return dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, needed=needed))
    except RecipeError:
        raise
    except ValueError as error:
        raise document.restate(error) from error


def _with_template(values: object, document: Document) -> dict[str, Any]:
    """Replace the path of a chat template by the template; a text with a brace in it is a template already.

    The recipe that is saved with a run then holds the template itself, and an edit of the file changes the recipe.
    """
    section = as_mapping(values, ("model",), document)
    template = section.get("chat_template")
    if not isinstance(template, str) or "{" in template:
        return section
    file = Path(document.file).parent / os.path.expanduser(template)
    try:
        if not file.is_file():
            raise FileNotFoundError(f"no file {str(file)!r}")
        return {**section, "chat_template": file.read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        rule = f"{template!r} is neither a Jinja template nor a file beside the recipe that can be read ({error})"
        raise document.error(("model", "chat_template"), rule) from error


def _build_task(values: object, document: Document) -> TaskSection:
    keys = dict(as_mapping(values, ("task",), document))
    if "name" not in keys:
        raise document.error(("task", "name"), "missing: this key is needed")
    name = document.with_code(convert(keys.pop("name"), str, ("task", "name"), document))
    try:
        config_class = task_module(name).Config
    except ValueError as error:
        raise document.error(
            ("task", "name"), f"{str(error).removeprefix('task.name: ')}{did_you_mean(name, TASK_NAMES)}"
        ) from error
    except AttributeError:
        config_class = None
    if not dataclasses.is_dataclass(config_class):
        raise document.error(
            ("task", "name"), f"the module {name!r} has no dataclass Config; it needs files and load too"
        )
    if missing := {"language", "ppo_examples"} - {f.name for f in dataclasses.fields(config_class)}:
        raise document.error(("task", "name"), f"the Config of {name!r} lacks {', '.join(sorted(missing))}; add it")
    if isinstance(keys.get("augment"), list):
        keys["augment"] = [_augment_step(item, document) for item in keys["augment"]]
    return TaskSection(name, build_section(config_class, document.with_folder(keys), ("task",), document))


def _augment_step(item: object, document: Document) -> object:
    """Write a line of `task.augment` as a mapping; anything that is none is refused with its section."""
    step = {"name": item} if isinstance(item, str) else item
    if isinstance(step, dict) and isinstance(step.get("name"), str):
        return {**step, "name": document.with_code(step["name"])}
    return step


def _build_ppo(values: object, model: ModelConfig, document: Document) -> PPOConfig | None:
    """Make the `ppo:` section, or None without one; `use_peft` is that of the model section unless it says else."""
    if values is None:
        return None
    keys = {"use_peft": model.use_peft, **as_mapping(values, ("ppo",), document)}
    for key in keys.keys() & REFUSED_PPO_KEYS.keys():
        raise document.unknown(("ppo", key), REFUSED_PPO_KEYS[key])
    keys = _with_options(keys, "rewards", RewardConfig, ("ppo",), document)
    if keys.get("chat_template_kwargs"):
        rule = "it would hold for PPO alone; write model.chat_template_kwargs, which holds for every stage"
        raise document.error(("ppo", "chat_template_kwargs"), rule)
    if isinstance(keys.get("algorithm"), str) and keys["algorithm"] in ALGORITHMS:
        try:
            keys |= expand_algorithm(keys["algorithm"], keys)
        except ValueError as error:
            raise document.restate(error) from error
    ppo = build_section(PPOConfig, keys, ("ppo",), document)
    if not ppo.rewards:
        raise document.error(("ppo", "rewards"), "at least one reward is needed, such as [{name: bleu}]")
    return ppo


def _build_eval(values: object, ppo: PPOConfig | None, document: Document) -> EvalConfig:
    """Make the `eval:` section; without a ppo section there is no ppo system to evaluate."""
    keys = _with_options(as_mapping(values, ("eval",), document), "metrics", MetricConfig, ("eval",), document)
    config = build_section(EvalConfig, keys, ("eval",), document)
    if ppo is None and "ppo" in config.systems:
        if ("eval", "systems") in document.places:
            raise document.error(("eval", "systems"), "'ppo' cannot be evaluated: the recipe has no ppo section")
        config = dataclasses.replace(config, systems=tuple(s for s in config.systems if s != "ppo"))
    return fill_lengths(config, ppo)


def _with_options(
    section: Mapping[str, Any], key: str, cls: type, path: KeyPath, document: Document
) -> dict[str, Any]:
    """Write each reward or metric in the list `section[key]` as a mapping of the fields of `cls`.

    It may be a name, or a mapping with a name whose further keys are its options.
    """
    if not isinstance(section.get(key), list):
        return dict(section)
    items = [_named(item, cls, (*path, key, index), document) for index, item in enumerate(section[key])]
    return {**section, key: items}


def _named(item: object, cls: type, path: KeyPath, document: Document) -> dict[str, Any]:
    if isinstance(item, str):
        return {"name": document.with_code(item)}
    if not isinstance(item, dict):
        raise document.error(path, f"expected a name or a mapping with a name, found {shown(item)}")
    field_names = [f.name for f in dataclasses.fields(cls)]
    options = {key: value for key, value in item.items() if key not in field_names}
    for key in options:
        if hint := did_you_mean(key, [name for name in field_names if name != "options" and name not in item]):
            rule = f"unknown key{hint} (an option of that name goes into options: {{{key}: ...}})"
            raise document.error((*path, key), rule)
    options |= as_mapping(item.get("options"), (*path, "options"), document)
    values = {key: value for key, value in item.items() if key in field_names}
    if isinstance(item.get("name"), str):
        values["name"] = document.with_code(item["name"])
    return {**values, "options": options}


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as plain nested values, from which `load_recipe` makes an equal recipe."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "output_dir": recipe.output_dir,
        **({"control": True} if recipe.control else {}),
        "model": _plain(recipe.model),
        "task": {"name": recipe.task.name, **_plain(recipe.task.config)},
        **({"sft": _plain(sft_values(recipe.sft))} if recipe.sft.needed else {}),
        **({} if recipe.reward is None else {"reward": reward_values(recipe.reward)}),
        **({} if recipe.ppo is None else {"ppo": _plain(recipe.ppo)}),
        "eval": _plain(recipe.eval),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, RewardConfig | MetricConfig) and not value.options:
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "options"}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
