"""The `sft:` and `reward:` sections: keyword arguments of TRL's configs, and a few keys of Relay's own."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from enum import EnumMeta
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from trl import RewardConfig, SFTConfig

from pipeline.evaluation.config import EvalConfig
from pipeline.models.config import ModelConfig
from pipeline.recipe.build import as_mapping, build_section, check_keys, convert, shown
from pipeline.recipe.document import Document
from pipeline.recipe.refused import (
    ACTS_ONLY_WITH,
    DEPRECATED_VALUES,
    IDLE_WITH,
    LOW_RANK_OPTIMIZERS,
    OPTIMIZERS_WITHOUT_ADAM,
    OPTIMIZERS_WITHOUT_ARGS,
    REFUSED_REWARD_KEYS,
    REFUSED_SFT_KEYS,
    UPLOADS,
)
from pipeline.recipe.types import PairSource, RewardSection, SFTSection
from pipeline.rewards.best_of_n import BEST_OF_N, REFERENCES, BestOfNSettings
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.tasks import preferences
from pipeline.trainers.huggingface import reward, sft
from pipeline.trainers.ppo.config import PPOConfig

Lengths = TypeVar("Lengths", SampledPairs, EvalConfig)
SAMPLE_KEYS = tuple(f.name for f in fields(BestOfNSettings))  # of `sft.from: best_of_n`
OWN_SFT_KEYS = ("use_peft", "from", *SAMPLE_KEYS)
OWN_REWARD_KEYS = ("pairs", "model", "min_accuracy", "margin_weight")


def build_sft_section(values: object, model: ModelConfig, document: Document) -> SFTSection:
    """Make the `sft:` section; texts are cut to what a from-scratch model can read, unless `max_length` says less.

    Raises:
        RecipeError: a key SFTConfig lacks, one that Relay sets itself or that would do nothing, or a wrong type.
    """
    values = dict(as_mapping(values, ("sft",), document))
    use_peft = values.pop("use_peft", model.use_peft and model.from_scratch is None)
    use_peft = convert(use_peft, bool, ("sft", "use_peft"), document)
    best_of_n = _build_best_of_n(values, document)
    arguments = _convert_arguments("sft", values, SFTConfig, REFUSED_SFT_KEYS, OWN_SFT_KEYS, document)
    _refuse_conflicts("sft", arguments, SFTConfig, sft.DEFAULTS, document)
    if model.from_scratch is not None and "max_length" not in arguments:
        arguments["max_length"] = min(SFTConfig.max_length, model.from_scratch.max_position_embeddings)
    return SFTSection(use_peft, arguments, best_of_n=best_of_n)


def _build_best_of_n(values: dict[str, Any], document: Document) -> BestOfNSettings | None:
    """Take the keys of `sft.from` out of the section; None where SFT learns the completions of the data."""
    source = convert(values.pop("from", REFERENCES), Literal[REFERENCES, BEST_OF_N], ("sft", "from"), document)
    keys = {key: values.pop(key) for key in SAMPLE_KEYS if key in values}
    if source == BEST_OF_N:
        return build_section(BestOfNSettings, keys, ("sft",), document)
    if keys:
        rule = f"it would do nothing without from: {BEST_OF_N}; set sft.from, or remove it"
        raise document.error(("sft", next(iter(keys))), rule)
    return None


def sft_values(section: SFTSection) -> dict[str, Any]:
    """Write the section as plain values under a recipe's names."""
    samples = {} if section.best_of_n is None else {"from": BEST_OF_N, **dataclasses.asdict(section.best_of_n)}
    return {"use_peft": section.use_peft, **samples, **section.arguments}


def build_reward_section(values: object, ppo: PPOConfig | None, document: Document) -> RewardSection:
    """Make the `reward:` section.

    Raises:
        RecipeError: a key RewardConfig lacks, one that Relay sets itself or that would do nothing, or a wrong type.
    """
    values = dict(as_mapping(values, ("reward",), document))
    relay_values = {key: values.pop(key) for key in OWN_REWARD_KEYS if key in values}
    pairs = _build_pairs(relay_values.pop("pairs", None), ppo, document)
    if relay_values.get("model") is not None:
        idle = next((key for key in (*values, "margin_weight") if key in values or key in relay_values), None)
        if idle is not None and idle != "per_device_eval_batch_size":
            rule = "it would do nothing: reward.model is used as it is, not trained"
            raise document.error(("reward", idle), rule)
    arguments = _convert_arguments("reward", values, RewardConfig, REFUSED_REWARD_KEYS, OWN_REWARD_KEYS, document)
    _refuse_conflicts("reward", arguments, RewardConfig, reward.DEFAULTS, document)
    hints = get_type_hints(RewardSection)
    relay_values = {key: convert(value, hints[key], ("reward", key), document) for key, value in relay_values.items()}
    try:
        return RewardSection(pairs=pairs, **relay_values, arguments=arguments)
    except ValueError as error:
        raise document.restate(error) from error


def _build_pairs(values: object, ppo: PPOConfig | None, document: Document) -> PairSource:
    path = ("reward", "pairs")
    keys = dict(as_mapping(values, path, document))
    if "path" in keys:
        if "from" in keys:
            raise document.error((*path, "from"), "it would do nothing, because path names a data set; keep one")
        return build_section(preferences.Config, document.with_folder(keys), path, document)
    if "origins" in keys:
        raise document.error((*path, "origins"), "unknown key; did you mean 'from'?")
    origins = keys.pop("from", None)
    if origins is not None:
        keys["origins"] = [origins] if isinstance(origins, str) else origins
    if isinstance(keys.get("metric"), str):
        keys["metric"] = document.with_code(keys["metric"])
    return fill_lengths(build_section(SampledPairs, keys, path, document), ppo)


def fill_lengths(config: Lengths, ppo: PPOConfig | None) -> Lengths:
    """Take from PPO, or from its defaults, where completions end as far as a section does not say it.

    `max_new_tokens` stays None where PPO too leaves it to the data.
    """
    lengths = {
        "max_new_tokens": PPOConfig.response_length if ppo is None else ppo.response_length,
        "min_new_tokens": PPOConfig.min_new_tokens if ppo is None else ppo.min_new_tokens,
        "stop_strings": PPOConfig.stop_strings if ppo is None else ppo.stop_strings,
        "suppress_tokens": PPOConfig.suppress_tokens if ppo is None else ppo.suppress_tokens,
    }
    missing = [key for key in lengths if getattr(config, key) is None]
    return dataclasses.replace(config, **{key: lengths[key] for key in missing})


def reward_values(section: RewardSection) -> dict[str, Any]:
    """Write the section as plain values under a recipe's names."""
    pairs = {f.name: getattr(section.pairs, f.name) for f in fields(section.pairs)}
    pairs = {key: list(value) if isinstance(value, tuple) else value for key, value in pairs.items()}
    if isinstance(section.pairs, SampledPairs):
        pairs = {"from": pairs.pop("origins"), **pairs}
    values = {"model": section.model, "min_accuracy": section.min_accuracy}
    if section.model is None:
        values["margin_weight"] = section.margin_weight
    return {"pairs": pairs, **values, **section.arguments}


def _convert_arguments(
    section: str,
    values: Mapping[str, Any],
    config_class: type,
    refused: Mapping[str, str],
    relay_keys: Iterable[str],
    document: Document,
) -> dict[str, Any]:
    """Check a section against the fields of a config class of TRL, without building one, which would touch devices.

    `relay_keys` are the section's keys of Relay.

    Raises:
        RecipeError: a key the class lacks, a refused one, a wrong type, or a value that is none of its choices.
    """
    for key in values:
        if key in refused or key.startswith(("hub_", "push_to_hub")):
            reason = refused.get(key, UPLOADS)
            raise document.unknown(
                (section, key), f"this key of {config_class.__name__} is not for a recipe: {reason}"
            )
    config_fields, hints = {f.name: f for f in fields(config_class)}, get_type_hints(config_class)
    check_keys(values, [*relay_keys, *(name for name in config_fields if name not in refused)], (section,), document)
    arguments = {}
    for key, value in values.items():
        converted = convert(value, _allowed(config_fields[key], hints[key]), (section, key), document)
        arguments[key] = converted if isinstance(converted, float) else value  # as written: no enums of transformers
    return arguments


def _allowed(field: Field, hint: Any) -> Any:
    """Return the type of a field of TRL; where TRL or an enum says which texts are allowed, only these."""
    members = [member.value for option in get_args(hint) if isinstance(option, EnumMeta) for member in option]
    deprecated = DEPRECATED_VALUES.get(field.name)
    choices = tuple(choice for choice in field.metadata.get("choices") or members if choice != deprecated)
    if not choices:
        return hint
    return Literal[choices] | None if NoneType in get_args(hint) else Literal[choices]


def _refuse_conflicts(
    section: str, arguments: Mapping[str, Any], config_class: type, defaults: Mapping[str, Any], document: Document
) -> None:
    """Refuse keys of a section that others make idle.

    Raises:
        RecipeError: naming both.
    """
    effective = {f.name: f.default for f in fields(config_class)} | dict(defaults) | dict(arguments)

    def refuse(key: str, rule: str) -> None:
        raise document.error((section, key), f"it would do nothing{rule}")

    for key, (other, wanted) in ACTS_ONLY_WITH.items():
        if key in arguments and other in effective and effective[other] != wanted:
            fix = f"set {section}.{other}: {str(wanted).lower()} or remove it"
            refuse(key, f", because {other} is {shown(effective[other])}; {fix}")
    for key, (other, idle) in IDLE_WITH.items():
        if key in arguments and effective[other] == idle:
            refuse(key, f", because {other} is {shown(idle)}; set {section}.{other} or remove it")
    _check_best_model(section, arguments, effective, document)
    if "num_train_epochs" in arguments and effective["max_steps"] > 0:
        refuse("num_train_epochs", ", because max_steps is set; keep one")
    optimizer = str(effective["optim"])
    if "optim_args" in arguments and optimizer in OPTIMIZERS_WITHOUT_ARGS:
        refuse("optim_args", f": {optimizer} reads none; set {section}.optim")
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        without = optimizer.startswith(OPTIMIZERS_WITHOUT_ADAM) or (key == "adam_epsilon" and "lion" in optimizer)
        if key in arguments and without:
            refuse(key, f": {optimizer} does not read it; remove it, or set {section}.optim")
    if "optim_target_modules" in arguments and not optimizer.startswith(LOW_RANK_OPTIMIZERS):
        rule = f": only the optimizers of GaLore and APOLLO read it, and optim is {optimizer}"
        refuse("optim_target_modules", rule)
    reported = effective["report_to"] or []
    trackers = {reported} if isinstance(reported, str) else set(reported)
    if "run_name" in arguments and not trackers - {"none", "tensorboard"}:
        tracker = "tensorboard, which has no names of runs" if "tensorboard" in trackers else "none"
        refuse("run_name", f", because report_to is {tracker}; set {section}.report_to")
    if "project" in arguments and not trackers & {"trackio", "all"}:
        refuse("project", ": only report_to: trackio reads it")
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in arguments and arguments.get(new) is not None:
            refuse(old, f", because {new} is set too; keep one")


def _check_best_model(
    section: str, arguments: Mapping[str, Any], effective: Mapping[str, Any], document: Document
) -> None:
    """Refuse a best model that would not be saved: transformers would find it once the stage has started.

    Raises:
        RecipeError: models are evaluated and saved at different times.
    """
    evaluates, saves = effective["eval_strategy"], effective["save_strategy"]
    keeps_best = effective["load_best_model_at_end"] and saves != "best"
    if not keeps_best or (evaluates == "no" and "load_best_model_at_end" not in arguments):
        return
    steps = effective["eval_steps"] or effective["logging_steps"]
    ratio = effective["save_steps"] / steps
    if evaluates != saves:
        key, found = "save_strategy", f"eval_strategy is {evaluates} and save_strategy is {saves}"
    elif saves == "steps" and abs(ratio - round(ratio)) > 1e-6:
        key, found = "save_steps", f"{effective['save_steps']:g} is no multiple of eval_steps, which is {steps:g}"
    else:
        return
    key = key if key in arguments else key.replace("save", "eval")
    rule = f"the best model is kept, which is saved where it is evaluated, but {found}"
    raise document.error((section, key), f"{rule}; make them agree, or set {section}.load_best_model_at_end: false")
