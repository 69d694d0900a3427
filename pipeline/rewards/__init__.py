"""What PPO is paid for: metrics by name, a constant, or any function with TRL's GRPO reward signature; weights."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.metrics import METRIC_NAMES, load_metric
from pipeline.rewards.config import RewardConfig
from pipeline.rewards.constant import constant_reward
from pipeline.rewards.metric import metric_reward

__all__ = [
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardFunction",
    "build_rewards",
    "check_rewards",
    "combine",
    "score_all",
]


class RewardFunction(Protocol):
    """TRL's GRPO reward signature: one number for each completion, or None where the function does not apply.

    `prompts` and `completions` are texts (for chat data, message lists); `completion_ids` their token ids; every
    column of the data set arrives by name, aligned, `references` among them.
    """

    def __call__(self, prompts: list, completions: list, **columns: list) -> list[float | None]:
        """Score the completions."""
        ...


class RewardError(ValueError):
    """A reward function failed or returned something that is not one finite number for each completion."""


@dataclass(frozen=True)
class Reward:
    """A reward function under the name it is logged by, with its weight in the score."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def build_rewards(configs: Sequence[RewardConfig], language: str | None = None) -> list[Reward]:
    """Look each reward up: `constant`, a metric's name, or the dotted path of a function.

    Raises:
        ValueError: an unknown name or option; a path that cannot be imported or is not callable.
    """
    rewards = [Reward(config.name, _function(config, language), config.weight) for config in configs]
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"ppo.rewards: each reward once, found {', '.join(names)}")
    return rewards


def _function(config: RewardConfig, language: str | None) -> RewardFunction:
    if config.name == "constant":
        return _make(constant_reward, config)
    if config.name in METRIC_NAMES or ":" in config.name:
        return metric_reward(load_metric(config.name, language, **config.options))
    if "." not in config.name:
        known = ", ".join(("constant", *METRIC_NAMES))
        raise ValueError(
            f"ppo.rewards: {config.name!r} is not one of {known}, nor the dotted path of a function "
            "(package.module.function)"
        )
    module_name, _, attribute = config.name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"ppo.rewards: cannot import {config.name!r} ({error})") from error
    except Exception as error:  # a module of one's own may fail in any way
        raise ValueError(f"ppo.rewards: cannot import {config.name!r} ({type(error).__name__}: {error})") from error
    if inspect.isclass(function) or config.options:
        function = _make(function, config)
    if not callable(function):
        raise ValueError(f"ppo.rewards: {config.name!r} is a {type(function).__name__}, not a function")
    return function


def _make(factory: Callable[..., RewardFunction], config: RewardConfig) -> RewardFunction:
    """The reward function that a class or function makes of the options."""
    try:
        return factory(**config.options)
    except Exception as error:  # as above
        raise ValueError(
            f"ppo.rewards: {config.name!r} cannot be made with the options {dict(config.options)!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def score_all(
    rewards: Sequence[Reward], prompts: list, completions: list, columns: dict[str, list]
) -> dict[str, Tensor]:
    """Each reward's values [B] by name; NaN where a function returned None.

    Raises:
        RewardError: a function raised, or its result is not one finite number or None for each completion.
    """
    scores = {}
    for reward in rewards:
        try:
            result = reward.function(prompts=prompts, completions=completions, **columns)
        except Exception as error:
            raise RewardError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error
        scores[reward.name] = torch.tensor(_checked(reward.name, result, completions), dtype=torch.float32)
    return scores


def _checked(name: str, result: object, completions: list) -> list[float]:
    if isinstance(result, Tensor | np.ndarray):
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__}, expected a list of {len(completions)} numbers"
        )
    if len(result) != len(completions):
        raise RewardError(
            f"reward {name!r} returned {len(result)} values, expected one for each of {len(completions)} completions"
        )
    values = []
    for index, (value, completion) in enumerate(zip(result, completions, strict=True)):
        if value is None:
            values.append(math.nan)
            continue
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise RewardError(
                f"reward {name!r} returned {_excerpt(value)} for completion {index} ({_excerpt(completion)}), "
                "expected a finite number or None"
            )
        values.append(number)
    return values


def _number(value: object) -> float | None:
    """A number of any library as a float; None for what is none, a text with digits included."""
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def _excerpt(completion: object) -> str:
    text = repr(completion)
    return text if len(text) <= 80 else text[:77] + "..."


def as_completions(prompts: Sequence, texts: Sequence[str]) -> list:
    """Completions as reward functions expect them: texts, or for chat prompts one assistant message each."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def combine(rewards: Sequence[Reward], scores: dict[str, Tensor]) -> Tensor:
    """The weighted sum [B] of the rewards that apply to each completion.

    Raises:
        RewardError: a completion that no reward applies to.
    """
    values = torch.stack([scores[reward.name] for reward in rewards])
    weights = torch.tensor([reward.weight for reward in rewards]).unsqueeze(1)
    nothing = values.isnan().all(0)
    if nothing.any():
        raise RewardError(f"no reward applies to completion {int(nothing.nonzero()[0])}: every function returned None")
    return (values.nan_to_num(0.0) * weights).sum(0)


def check_rewards(rewards: Sequence[Reward], rows: dict[str, list]) -> None:
    """Score the own completions of a few `rows`, so that a broken reward stops the run before any training.

    Raises:
        RewardError: as `score_all` and `combine`.
    """
    columns = {name: values for name, values in rows.items() if name not in ("prompt", "completion")}
    columns["completion_ids"] = [[0]] * len(rows["prompt"])
    completions = as_completions(rows["prompt"], rows["completion"])
    combine(rewards, score_all(rewards, rows["prompt"], completions, columns))
