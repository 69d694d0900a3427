"""Find before a run starts what would stop it hours later: missing files and models, sizes that cannot work."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.metrics import load_metric
from pipeline.models.adapters import DECODER_LINEAR
from pipeline.models.config import ModelConfig
from pipeline.models.hub import check_model_path
from pipeline.models.loading import is_encoder_decoder, load_config, position_limit
from pipeline.models.reward_model import RECORD_FILE, load_record
from pipeline.recipe.document import Document, KeyPath, RecipeError
from pipeline.recipe.load import load_recipe
from pipeline.recipe.measure_checks import check_measures
from pipeline.recipe.model_checks import check_models, reward_base, trains_adapter
from pipeline.recipe.refused import REFUSED_FOR_ENCODER_DECODERS
from pipeline.recipe.types import Recipe
from pipeline.rewards.classifier import check_classifier
from pipeline.rewards.learned import (
    check_accuracy,
    check_learned_options,
    check_reward_folder,
    is_reward_folder,
)
from pipeline.runtime.libraries import quiet_libraries
from pipeline.tasks import columns, preferences, task_module
from pipeline.tasks.counts import count_examples
from pipeline.trainers.ppo.config_checks import check_steps

# Keys whose values are paths, wherever in a recipe.
PATH_KEYS = {"output_dir", "data_dir", "path", "source", "target", "control", "model"}
PATH_KEYS |= {"model_name_or_path", "sft_model_path", "reward_model_path"}


def load_checked_recipe(path: str | Path, overrides: Sequence[str], num_processes: int) -> Recipe:
    """Load and check a recipe for a program.

    Raises:
        RecipeError: as `load_recipe` and `check_recipe`.
    """
    quiet_libraries()
    recipe = load_recipe(path, overrides)
    check_recipe(recipe, num_processes)
    return recipe


def check_recipe(recipe: Recipe, num_processes: int = 1) -> None:
    """Check files, models, metrics, rewards and sizes, so that a run does not fail hours later; no model is loaded.

    Raises:
        RecipeError: a model, file, metric or reward that is not there, sizes that cannot work, an option without
            effect, or an output directory that cannot be written.
    """
    document = recipe.source or Document("recipe")
    try:
        _check_all(recipe, num_processes, document)
    except RecipeError:
        raise
    except (ValueError, OSError) as error:  # an OSError: a path that no file system takes, or without permission
        raise document.restate(error) from error


def _check_homes(value: object, document: Document, path: KeyPath = ()) -> None:
    """Refuse a path that begins with the home of a user whom this machine does not have, before anything opens it."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_homes(item, document, (*path, key))
        return
    is_path = isinstance(value, str) and path[-1] in PATH_KEYS
    if is_path and value.startswith("~") and os.path.expanduser(value).startswith("~"):
        raise document.error(path, f"there is no home directory for the ~ of {value!r}; write the path out")


def _check_all(recipe: Recipe, num_processes: int, document: Document) -> None:
    _check_homes(document.data, document)
    check_models(recipe)
    task_module(recipe.task.name).files(recipe.task.config)
    if isinstance(recipe.task.config, columns.Config):
        columns.check_reachable(recipe.task.config)
    _check_reward_model(recipe, document)
    _check_idle_options(recipe, document)
    _check_family(recipe, document)
    _check_lengths(recipe, document)
    _check_batches(recipe, num_processes, document)
    check_measures(recipe, document)
    _check_writable(recipe, document)


def _check_reward_model(recipe: Recipe, document: Document) -> None:
    """Check that the learned reward is a reward model that exists, or one that this recipe's reward stage makes."""
    if recipe.reward is not None:
        if isinstance(recipe.reward.pairs, preferences.Config):
            preferences.files(recipe.reward.pairs)
            preferences.check_reachable(recipe.reward.pairs)
        else:
            _check_pairs_metric(recipe)
        if recipe.reward.model is not None:
            check_model_path(recipe.reward.model, "reward.model")
            check_classifier(recipe.reward.model, recipe.model, "reward.model")
    learned = recipe.ppo.learned_reward if recipe.ppo is not None else None
    if learned is None:
        return
    path = recipe.ppo.reward_model_path
    if path is None and recipe.reward is None:
        raise document.error(
            ("ppo", "rewards"),
            "'learned' needs a reward model: add a reward section, or name a finished one or a classifier in "
            "ppo.reward_model_path",
        )
    if path is None:
        is_adapter = recipe.reward.model is None
        check_learned_options(learned.options, is_adapter)
    elif is_reward_folder(path):
        record = load_record(path)
        is_adapter = record.kind == "adapter"
        check_learned_options(learned.options, is_adapter)
        check_accuracy(record, recipe.min_accuracy, path)
        check_reward_folder(path, record, reward_base(recipe))
    else:
        is_adapter = False
        check_learned_options(learned.options, is_adapter)
        _check_classifier_path(path)
    if recipe.ppo.value_model == "reward_model" and not is_adapter:
        rule = "reward_model needs a reward adapter over the SFT model, and 'learned' is a classifier; use adapter"
        raise document.error(("ppo", "value_model"), rule)


def _check_pairs_metric(recipe: Recipe) -> None:
    try:
        load_metric(recipe.reward.pairs.metric, recipe.language)
    except ValueError as error:
        raise ValueError(f"reward.pairs.metric: {error}") from error


def _check_classifier_path(path: str) -> None:
    if Path(path).expanduser().is_dir() and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(
            f"ppo.reward_model_path: {path!r} holds neither a finished reward model ({RECORD_FILE}) nor a classifier "
            "(config.json); finish its reward stage, or give another"
        )
    check_model_path(path, "ppo.reward_model_path")
    check_classifier(path, ModelConfig(model_name_or_path=path))


def _check_idle_options(recipe: Recipe, document: Document) -> None:
    """Refuse options that would change nothing."""
    if recipe.model.load_in_4bit and recipe.ppo is not None and not recipe.ppo.use_peft:
        rule = "PPO trains all weights (ppo.use_peft: false), which needs them whole; train an adapter, or remove it"
        raise document.error(("model", "load_in_4bit"), rule)
    trains_weights = recipe.ppo is not None and (not recipe.ppo.use_peft or recipe.model.lora_modules_to_save)
    if trains_weights and recipe.model.dtype in ("bfloat16", "float16"):
        rule = f"PPO would train weights in {recipe.model.dtype}, where its small steps are rounded away"
        raise document.error(("model", "dtype"), f"{rule}; remove it, or train an adapter alone")
    if recipe.ppo is not None and recipe.ppo.run_name is not None and not recipe.ppo.report_to:
        raise document.error(("ppo", "run_name"), "it would do nothing, because report_to is empty; set ppo.report_to")
    if trains_adapter(recipe):
        return
    adapter_keys = ("lora_", "use_rslora", "use_dora", "load_in_4bit")
    for f in dataclasses.fields(ModelConfig):
        if f.name.startswith(adapter_keys) and getattr(recipe.model, f.name) != f.default:
            raise document.error(("model", f.name), "it would do nothing, because no stage has use_peft: true")


def _check_family(recipe: Recipe, document: Document) -> None:
    """Refuse what the model's family cannot do: options of SFT, adapters, language codes."""
    if not is_encoder_decoder(recipe.model):
        if recipe.model.lora_target_modules == DECODER_LINEAR:
            rule = f"{DECODER_LINEAR} is for encoder-decoders, and this model has no encoder; use all-linear"
            raise document.error(("model", "lora_target_modules"), rule)
        return
    arguments = recipe.sft.arguments
    for key, reason in REFUSED_FOR_ENCODER_DECODERS.items():
        if arguments.get(key):
            raise document.error(("sft", key), f"not for an encoder-decoder: {reason}; remove it")
    if arguments.get("completion_only_loss") is False:
        rule = "not for an encoder-decoder: it predicts no token of the prompt; remove it"
        raise document.error(("sft", "completion_only_loss"), rule)


def _check_lengths(recipe: Recipe, document: Document) -> None:
    """Refuse lengths beyond the model's positions; a generated text follows a prompt of at least one token."""
    scratch = recipe.model.from_scratch
    if scratch is None:
        config = load_config(recipe.model.model_name_or_path, recipe.model)
        limit, two_sides = position_limit(config), config.is_encoder_decoder
        rule = f"max_position_embeddings ({limit}) of {recipe.model.model_name_or_path!r}"
    else:
        limit, two_sides = scratch.max_position_embeddings, scratch.is_encoder_decoder
        rule = f"model.from_scratch.max_position_embeddings ({limit})"
    max_length = recipe.sft.arguments.get("max_length")
    if limit is not None and max_length is not None and max_length > limit:
        raise document.error(("sft", "max_length"), f"must be at most {rule}, found {max_length}")
    if limit is None or (scratch is not None and scratch.architecture == "t5"):  # relative positions
        return
    for path, length in _generated_lengths(recipe).items():
        if two_sides and length > limit:
            raise document.error(path, f"must be at most {rule}, found {length}")
        if not two_sides and length >= limit:
            raise document.error(path, f"must be below {rule} to leave room for the prompt, found {length}")


def _generated_lengths(recipe: Recipe) -> dict[KeyPath, int]:
    """Return the most tokens that each stage generates after a prompt, as far as the recipe sets them."""
    lengths: dict[KeyPath, int | None] = {}
    if recipe.reward is not None and not isinstance(recipe.reward.pairs, preferences.Config):
        lengths[("reward", "pairs", "max_new_tokens")] = recipe.reward.pairs.max_new_tokens
    if recipe.ppo is not None:
        lengths[("ppo", "response_length")] = recipe.ppo.response_length
    lengths[("eval", "max_new_tokens")] = recipe.eval.max_new_tokens
    return {path: length for path, length in lengths.items() if length is not None}


def _check_batches(recipe: Recipe, num_processes: int, document: Document) -> None:
    """Refuse batches of no example, a PPO batch of more prompts than there are, and a warm-up as long as PPO."""
    for section, settings in (("sft", recipe.sft), ("reward", recipe.reward)):
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if settings is not None and settings.arguments.get(key, 1) < 1:
                raise document.error((section, key), f"must be at least 1, found {settings.arguments[key]}")
    counts, held_out = count_examples(recipe.task.config), recipe.task.config.ppo_examples
    if counts.sft is not None and counts.sft < 1:
        rule = f"must be below the {counts.sft + held_out} training examples, found {held_out}"
        raise document.error(("task", "ppo_examples"), rule)
    if recipe.ppo is None:
        return
    check_steps(recipe.ppo, num_processes)
    if counts.ppo is None:
        return
    copies = recipe.ppo.num_generations
    size = recipe.ppo.batch_size(num_processes) // copies
    if size > counts.ppo:
        limit = f"task.ppo_examples keeps {held_out}" if held_out else f"there are {counts.ppo} training examples"
        shared = f" / num_generations {copies}" if copies > 1 else ""
        raise document.error(
            ("ppo", "per_device_train_batch_size"),
            f"one PPO batch is {recipe.ppo.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{recipe.ppo.gradient_accumulation_steps} x processes {num_processes}{shared} = {size} prompts, "
            f"but {limit}; lower one of them",
        )


def _check_writable(recipe: Recipe, document: Document) -> None:
    """Write and remove a file where the run and its stages are or will be; no directory is made."""
    target = Path(recipe.output_dir).expanduser() / recipe.name
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    stages = [p for p in existing.iterdir() if p.is_dir()] if existing == target and target.is_dir() else []
    for folder in (existing, *stages):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"relay")
        except OSError as error:
            rule = f"cannot write to {str(folder)!r} ({error.strerror}); choose another directory"
            raise document.error(("output_dir",), rule) from error
