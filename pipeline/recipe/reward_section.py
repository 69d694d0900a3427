"""The `reward:` section: where pairs come from, what is trained on them, and when PPO may use it."""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from trl import RewardConfig

from pipeline.recipe.build import (
    as_mapping,
    build_section,
    convert_arguments,
    refuse_conflicts,
)
from pipeline.recipe.document import Document
from pipeline.recipe.refused import REFUSED_REWARD_KEYS
from pipeline.recipe.types import PairSource, RewardSection
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.tasks import preferences
from pipeline.trainers.huggingface.reward import DEFAULTS
from pipeline.trainers.ppo.config import PPOConfig


@dataclass(frozen=True)
class _OwnKeys:
    """The keys of the section that are Relay's, without the pairs."""

    model: str | None = RewardSection.model
    min_accuracy: float = RewardSection.min_accuracy
    margin_weight: float = RewardSection.margin_weight


def build_reward_section(values: object, ppo: PPOConfig | None, document: Document) -> RewardSection:
    """The `reward:` section, checked against `trl.RewardConfig`'s fields without building one.

    Raises:
        RecipeError: a key RewardConfig lacks, one that Relay sets itself or that would do nothing, or a wrong type.
    """
    values = dict(as_mapping(values, ("reward",), document))
    names = ("pairs", *(f.name for f in fields(_OwnKeys)))
    own = {key: values.pop(key) for key in names if key in values}
    pairs = _build_pairs(own.pop("pairs", None), ppo, document)
    if own.get("model") is not None:
        idle = next((key for key in (*values, "margin_weight") if key in values or key in own), None)
        if idle is not None and idle != "per_device_eval_batch_size":
            raise document.error(("reward", idle), "it would do nothing: reward.model is judged as it is, not trained")
    arguments = convert_arguments("reward", values, RewardConfig, REFUSED_REWARD_KEYS, names, document)
    refuse_conflicts("reward", arguments, RewardConfig, DEFAULTS, document)
    section = build_section(_OwnKeys, own, ("reward",), document)
    try:
        return RewardSection(pairs=pairs, **vars(section), arguments=arguments)
    except ValueError as error:
        raise document.restate(error) from error


def _build_pairs(values: object, ppo: PPOConfig | None, document: Document) -> PairSource:
    keys, path = dict(as_mapping(values, ("reward", "pairs"), document)), ("reward", "pairs")
    if "path" in keys:
        if "from" in keys:
            raise document.error((*path, "from"), "it would do nothing, because path names a data set; keep one")
        return build_section(preferences.Config, keys, path, document)
    if "origins" in keys:
        raise document.error((*path, "origins"), "unknown key; did you mean 'from'?")
    origins = keys.pop("from", None)
    if origins is not None:
        keys["origins"] = [origins] if isinstance(origins, str) else origins
    config = build_section(SampledPairs, keys, path, document)
    resolved = {
        "max_new_tokens": PPOConfig.response_length if ppo is None else ppo.response_length,
        "min_new_tokens": 0 if ppo is None else ppo.min_new_tokens,
        "stop_strings": () if ppo is None else ppo.stop_strings,
    }
    return dataclasses.replace(config, **{k: v for k, v in resolved.items() if getattr(config, k) is None})


def reward_values(section: RewardSection) -> dict[str, Any]:
    """The section as plain values under a recipe's names."""
    pairs = {f.name: getattr(section.pairs, f.name) for f in fields(section.pairs)}
    pairs = {key: list(value) if isinstance(value, tuple) else value for key, value in pairs.items()}
    if isinstance(section.pairs, SampledPairs):
        pairs = {"from": pairs.pop("origins"), **pairs}
    own = {f.name: getattr(section, f.name) for f in fields(_OwnKeys)}
    if section.model is not None:
        del own["margin_weight"]
    return {"pairs": pairs, **own, **section.arguments}
