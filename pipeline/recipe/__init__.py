"""One YAML file and overrides -> a typed, checked Recipe. Each package owns its section; this file collects them."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pipeline.evaluation.config import EvalConfig, MetricConfig
from pipeline.models.config import ModelConfig
from pipeline.recipe.build import (
    TOP_LEVEL,
    SFTSection,
    as_mapping,
    build_section,
    build_sft_section,
    check_keys,
    convert,
)
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.document import Document, RecipeError, did_you_mean
from pipeline.recipe.reader import read_document
from pipeline.recipe.reward_section import RewardSection, build_reward_section, reward_values
from pipeline.rewards.config import RewardConfig
from pipeline.runtime.messages import one_line
from pipeline.tasks import TASK_NAMES, parallel, task_module
from pipeline.trainers.ppo.config import PPOConfig

__all__ = [
    "Recipe",
    "RecipeError",
    "RewardSection",
    "SFTSection",
    "TaskSection",
    "check_recipe",
    "exit_with_error",
    "load_checked_recipe",
    "load_recipe",
    "parse_stage_arguments",
    "recipe_values",
    "split_recipe_argument",
]

DEFAULT_RECIPE = Path("recipes/quickstart.yaml")
MAX_SEED = 2**32 - 1
MAX_NAME = 100  # characters; a file system takes 255 bytes, and stages that are set aside add to it


@dataclass(frozen=True)
class TaskSection:
    """The `task:` section: a kind of task and an instance of `task_module(name).Config`."""

    name: str
    config: Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything one experiment depends on, resolved: no value is left to be derived from another section."""

    name: str
    seed: int = 0
    output_dir: str = "runs"
    model: ModelConfig
    task: TaskSection
    sft: SFTSection
    reward: RewardSection | None = None
    ppo: PPOConfig | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    source: Document | None = field(default=None, compare=False, repr=False)  # where it was written, for messages

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"name: {self.name!r} names a directory: use letters, digits, '.', '_' and '-', "
                "starting with a letter, digit or '_'"
            )
        if len(self.name) > MAX_NAME:
            raise ValueError(f"name: at most {MAX_NAME} characters, found {len(self.name)}")
        if "\0" in self.output_dir:
            raise ValueError(f"output_dir: a path cannot hold a NUL character, found {self.output_dir!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: must be from 0 to {MAX_SEED}, found {self.seed}")

    @property
    def language(self) -> str | None:
        """The language of the completions where the task section says it: metrics choose their tokenizer by it."""
        return dataclasses.asdict(self.task.config).get("language")

    @property
    def training_examples(self) -> int | None:
        """Examples SFT trains on, where that is known without loading them."""
        rows, kept = self._training_rows, getattr(self.task.config, "ppo_examples", None)
        return rows if rows is None else rows - (kept or 0)

    @property
    def ppo_prompts(self) -> int | None:
        """Prompts PPO draws from, where that is known without loading them."""
        return getattr(self.task.config, "ppo_examples", None) or self._training_rows

    @property
    def _training_rows(self) -> int | None:
        match self.task.config:
            case parallel.Config() as config:
                return parallel.training_rows(config)
            case _:
                return None

    @property
    def sft_is_external(self) -> bool:
        """Whether PPO starts from a model made elsewhere, so that this recipe's sft stage is not needed."""
        return self.ppo is not None and self.ppo.sft_model_path is not None

    @property
    def reward_is_external(self) -> bool:
        """Whether PPO is paid by a reward model made elsewhere, so that this recipe's reward stage is not needed."""
        return self.ppo is not None and self.ppo.reward_model_path is not None

    @property
    def uses_own_reward(self) -> bool:
        """Whether PPO is paid by what the reward stage of this run makes."""
        return self.ppo is not None and self.ppo.learned_reward is not None and not self.reward_is_external

    @property
    def min_accuracy(self) -> float:
        """The held-out accuracy below which PPO refuses a reward model."""
        return RewardSection.min_accuracy if self.reward is None else self.reward.min_accuracy


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `section.key=value` overrides laid over it.

    Only the text is judged here; `check_recipe` then looks at files, models, metrics and rewards.

    Raises:
        RecipeError: one sentence with the place, the key, what was found and, where there is one, the key meant.
    """
    document = read_document(path, overrides)
    values = document.data
    check_keys(values, TOP_LEVEL, (), document)
    for section in ("name", "model", "task"):
        if values.get(section) is None:
            raise document.error((section,), "missing: this key is needed")
    scalars = {
        key: convert(values[key], annotation, (key,), document)
        for key, annotation in (("name", str), ("seed", int), ("output_dir", str))
        if key in values
    }
    model = build_section(ModelConfig, values["model"], ("model",), document)
    ppo = _build_ppo(values.get("ppo"), model, document)
    try:
        return Recipe(
            **scalars,
            model=model,
            task=_build_task(values["task"], document),
            sft=build_sft_section(values.get("sft"), model, document),
            reward=build_reward_section(values["reward"], ppo, document) if "reward" in values else None,
            ppo=ppo,
            eval=_build_eval(values.get("eval"), ppo, document),
            source=document,
        )
    except RecipeError:
        raise
    except ValueError as error:
        raise document.restate(error) from error


def _build_task(values: object, document: Document) -> TaskSection:
    keys = dict(as_mapping(values, ("task",), document))
    if "name" not in keys:
        raise document.error(("task", "name"), "missing: this key is needed")
    name = convert(keys.pop("name"), str, ("task", "name"), document)
    if isinstance(keys.get("data_dir"), str):
        keys["data_dir"] = keys["data_dir"].replace("{recipe_dir}", _recipe_dir(document))
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
    return TaskSection(name, build_section(config_class, keys, ("task",), document))


def _recipe_dir(document: Document) -> str:
    """Return the folder of the recipe's file: relative where the current folder holds it, otherwise absolute."""
    folder = os.path.dirname(os.path.abspath(document.file))
    return os.path.relpath(folder) if Path(folder).is_relative_to(os.getcwd()) else folder


def _build_ppo(values: object, model: ModelConfig, document: Document) -> PPOConfig | None:
    """The `ppo:` section, or None where there is none; its adapter follows `model.use_peft` unless it says else."""
    if values is None:
        return None
    keys = as_mapping(values, ("ppo",), document)
    return build_section(PPOConfig, {"use_peft": model.use_peft, **keys}, ("ppo",), document)


def _build_eval(values: object, ppo: PPOConfig | None, document: Document) -> EvalConfig:
    """The `eval:` section; without a ppo section there is no ppo system to evaluate."""
    config = build_section(EvalConfig, values, ("eval",), document)
    if ppo is None and "ppo" in config.systems:
        if ("eval", "systems") in document.places:
            raise document.error(("eval", "systems"), "'ppo' cannot be evaluated: the recipe has no ppo section")
        config = dataclasses.replace(config, systems=tuple(s for s in config.systems if s != "ppo"))
    if config.max_new_tokens is None:
        length = PPOConfig.response_length if ppo is None else ppo.response_length
        config = dataclasses.replace(config, max_new_tokens=length)
    if config.min_new_tokens is None:
        config = dataclasses.replace(config, min_new_tokens=ppo.min_new_tokens if ppo is not None else 0)
    if config.stop_strings is None:
        config = dataclasses.replace(config, stop_strings=ppo.stop_strings if ppo is not None else ())
    return config


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested values: what `load_recipe` reads an equal recipe from."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "output_dir": recipe.output_dir,
        "model": _plain(recipe.model),
        "task": {"name": recipe.task.name, **_plain(recipe.task.config)},
        "sft": {"use_peft": recipe.sft.use_peft, **_plain(recipe.sft.arguments)},
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
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def parse_stage_arguments(argv: Sequence[str], description: str) -> Recipe:
    """The checked recipe of a stage's command line, `[RECIPE] [section.key=value ...]`.

    A recipe that cannot be run ends the process with exit code 2 and one sentence on stderr, without a traceback.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"a YAML file (default: {DEFAULT_RECIPE})")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe, as YAML"
    )
    arguments = parser.parse_args(argv)
    path, overrides = split_recipe_argument([arguments.recipe or "", *arguments.overrides])
    try:
        return load_checked_recipe(path, overrides, int(os.environ.get("WORLD_SIZE", "1")))
    except RecipeError as error:
        exit_with_error(str(error))


def load_checked_recipe(path: str | Path, overrides: Sequence[str], num_processes: int) -> Recipe:
    """`load_recipe` and `check_recipe` for a program: dotted paths are also looked up in the current directory.

    Raises:
        RecipeError: as those two.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there replaces a library
    recipe = load_recipe(path, overrides)
    check_recipe(recipe, num_processes)
    return recipe


def split_recipe_argument(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The recipe and the overrides among positional arguments: the first is the recipe unless it has a `=`.

    Without one it is recipes/quickstart.yaml, here or else where Relay is installed from.
    """
    words = [word for word in arguments if word]
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    beside_package = Path(__file__).resolve().parent.parent.parent / DEFAULT_RECIPE
    return DEFAULT_RECIPE if DEFAULT_RECIPE.is_file() or not beside_package.is_file() else beside_package, words


def exit_with_error(message: str) -> NoReturn:
    """End this process with exit code 2 and `error: message` on stderr, written by one process of a group."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)
