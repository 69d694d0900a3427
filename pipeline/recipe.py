"""One YAML file and overrides -> a typed, checked Recipe. Each package owns its section; this file collects them."""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pipeline.evaluation.config import EvalConfig, MetricConfig
from pipeline.metrics import load_metric
from pipeline.models.config import ModelConfig
from pipeline.models.loading import check_model_path
from pipeline.recipe_sections import (
    TOP_LEVEL,
    SFTSection,
    as_mapping,
    build_section,
    build_sft_section,
    check_keys,
    convert,
    refuse_unsupported,
)
from pipeline.recipe_yaml import Document, RecipeError, did_you_mean, read_document
from pipeline.rewards import build_rewards
from pipeline.rewards.config import RewardConfig
from pipeline.tasks import TASK_NAMES, parallel, synthetic, task_module
from pipeline.trainers.config import PPOConfig

DEFAULT_RECIPE = Path("recipes/quickstart.yaml")
MAX_SEED = 2**32 - 1


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
    ppo: PPOConfig | None = None
    eval: EvalConfig = EvalConfig()
    source: Document | None = field(default=None, compare=False, repr=False)  # where it was written, for messages

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"name: {self.name!r} names a directory: use letters, digits, '.', '_' and '-', "
                "starting with a letter, digit or '_'"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: must be from 0 to {MAX_SEED}, found {self.seed}")

    @property
    def language(self) -> str | None:
        """The language of the completions where the task section says it: metrics choose their tokenizer by it."""
        return dataclasses.asdict(self.task.config).get("language")

    @property
    def training_examples(self) -> int | None:
        """Examples of the training split, where that is known without loading it."""
        match self.task.config:
            case synthetic.Config() as config:
                return config.train_examples
            case parallel.Config() as config:
                sides = [_stripped_lines(config.path(key, "train")) for key in ("source", "target")]
                examples = sum(1 for source, target in zip(*sides, strict=False) if source and target)
                return min(examples, config.max_train_examples or examples)
            case _:
                return None

    @property
    def sft_is_external(self) -> bool:
        """Whether PPO starts from a model made elsewhere, so that this recipe's sft stage is not needed."""
        return self.ppo is not None and self.ppo.sft_model_path is not None


def _stripped_lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `section.key=value` overrides laid over it.

    Only the text is judged here; `check_recipe` then looks at files, models, metrics and rewards.

    Raises:
        RecipeError: one sentence with the place, the key, what was found and, where there is one, the key meant.
    """
    document = read_document(path, overrides)
    values = document.data
    refuse_unsupported(values, document)
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
    try:
        config_class = task_module(name).Config
    except ValueError as error:
        raise document.error(
            ("task", "name"), f"{str(error).removeprefix('task.name: ')}{did_you_mean(name, TASK_NAMES)}"
        ) from error
    except AttributeError as error:
        raise document.error(("task", "name"), f"the module {name!r} has no Config, files and load") from error
    return TaskSection(name, build_section(config_class, keys, ("task",), document))


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


def check_recipe(recipe: Recipe, num_processes: int = 1) -> None:
    """Look at everything a run of several hours would otherwise fail on late; no model is loaded.

    Raises:
        RecipeError: a model, file, metric or reward that is not there, sizes that cannot work, an option without
            effect, or an output directory that cannot be written.
    """
    document = recipe.source or Document("recipe")
    try:
        if recipe.model.model_name_or_path is not None:
            check_model_path(recipe.model.model_name_or_path, "model.model_name_or_path")
        if recipe.sft_is_external:
            check_model_path(recipe.ppo.sft_model_path, "ppo.sft_model_path")
        task_module(recipe.task.name).files(recipe.task.config)
    except ValueError as error:
        raise document.restate(error) from error
    _check_idle_options(recipe, document)
    _check_lengths(recipe, document)
    _check_batches(recipe, num_processes, document)
    _check_best_metric(recipe, document)
    _check_metrics_and_rewards(recipe, document)
    _check_writable(recipe, document)


def _check_idle_options(recipe: Recipe, document: Document) -> None:
    if recipe.ppo is not None and recipe.ppo.run_name is not None and not recipe.ppo.report_to:
        raise document.error(("ppo", "run_name"), "it would do nothing, because report_to is empty; set ppo.report_to")
    if recipe.sft.use_peft or (recipe.ppo is not None and recipe.ppo.use_peft):
        return
    for f in dataclasses.fields(ModelConfig):
        if f.name.startswith(("lora_", "use_rslora", "use_dora")) and getattr(recipe.model, f.name) != f.default:
            raise document.error(("model", f.name), "it would do nothing, because no stage has use_peft: true")


def _check_lengths(recipe: Recipe, document: Document) -> None:
    scratch = recipe.model.from_scratch
    if scratch is None:
        return
    limit = scratch.max_position_embeddings
    rule = f"model.from_scratch.max_position_embeddings ({limit})"
    max_length = recipe.sft.arguments.get("max_length")
    if max_length is not None and max_length > limit:
        raise document.error(("sft", "max_length"), f"must be at most {rule}, found {max_length}")
    generated = {("eval", "max_new_tokens"): recipe.eval.max_new_tokens}
    if recipe.ppo is not None:
        generated = {("ppo", "response_length"): recipe.ppo.response_length, **generated}
    for path, length in generated.items():
        if length >= limit:
            raise document.error(path, f"must be below {rule} to leave room for the prompt, found {length}")


def _check_batches(recipe: Recipe, num_processes: int, document: Document) -> None:
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if recipe.sft.arguments.get(key, 1) < 1:
            raise document.error(("sft", key), f"must be at least 1, found {recipe.sft.arguments[key]}")
    examples = recipe.training_examples
    if recipe.ppo is None or examples is None:
        return
    size = recipe.ppo.batch_size(num_processes)
    if size > examples:
        raise document.error(
            ("ppo", "per_device_train_batch_size"),
            f"one PPO batch is {recipe.ppo.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{recipe.ppo.gradient_accumulation_steps} x {num_processes} processes = {size} prompts, "
            f"but there are {examples} training examples; lower one of them",
        )


def _check_best_metric(recipe: Recipe, document: Document) -> None:
    chosen = {"sft": recipe.sft.arguments.get("metric_for_best_model")}
    if recipe.ppo is not None:
        chosen["ppo"] = recipe.ppo.metric_for_best_model
    for section, name in chosen.items():
        if name is not None and not name.startswith("eval_"):
            raise document.error(
                (section, "metric_for_best_model"),
                f"must be a logged evaluation metric, which starts with eval_, found {name!r}; "
                f"did you mean 'eval_{name}'?",
            )


def _check_metrics_and_rewards(recipe: Recipe, document: Document) -> None:
    for index, metric in enumerate(recipe.eval.metrics):
        try:
            load_metric(metric.name, recipe.language, **metric.options)
        except (ValueError, TypeError) as error:
            raise document.restate(error, ("eval", "metrics", index)) from error
    for index, reward in enumerate(recipe.ppo.rewards if recipe.ppo is not None else ()):
        try:
            build_rewards([reward], recipe.language)
        except (ValueError, TypeError) as error:
            raise document.restate(error, ("ppo", "rewards", index)) from error


def _check_writable(recipe: Recipe, document: Document) -> None:
    """Write and remove a file where the run directory is or will be; no directory is left behind."""
    target = Path(recipe.output_dir).expanduser() / recipe.name
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"relay")
    except OSError as error:
        raise document.error(
            ("output_dir",), f"cannot write to {str(existing)!r} ({error.strerror}); choose another directory"
        ) from error


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
        recipe = load_recipe(path, overrides)
        check_recipe(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    except RecipeError as error:
        exit_with_error(str(error))
    return recipe


def split_recipe_argument(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The recipe and the overrides among positional arguments: the first is the recipe unless it has a `=`.

    Without one it is recipes/quickstart.yaml, here or else where Relay is installed from.
    """
    words = [word for word in arguments if word]
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    beside_package = Path(__file__).resolve().parent.parent / DEFAULT_RECIPE
    return DEFAULT_RECIPE if DEFAULT_RECIPE.is_file() or not beside_package.is_file() else beside_package, words


def exit_with_error(message: str) -> NoReturn:
    """End this process with exit code 2 and `error: message` on stderr, written by one process of a group."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
