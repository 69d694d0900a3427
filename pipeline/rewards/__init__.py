"""What PPO is rewarded for: metrics by name, a constant, or any function with TRL's GRPO reward signature; weights."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import TrainerState

from pipeline.metrics import METRIC_NAMES, is_metric, load_metric
from pipeline.rewards.arguments import RewardLog
from pipeline.rewards.calling import RewardCall, merged_log, run_calls
from pipeline.rewards.config import RewardConfig, check_score_scaling
from pipeline.rewards.constant import constant_reward
from pipeline.rewards.metric import metric_reward
from pipeline.rewards.results import Handling, RewardError, finite_values, is_per_token, token_values
from pipeline.runtime.messages import did_you_mean
from pipeline.runtime.schedules import Schedule, check_schedule
from pipeline.runtime.user_code import FORMS, UserCodeError, is_user_code, load_user_object

__all__ = [
    "Handling",
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardFunction",
    "RewardLog",
    "RewardOutputs",
    "as_rewards",
    "build_rewards",
    "check_rewards",
    "combine",
    "compute_rewards",
]


LEARNED = "learned"


class RewardFunction(Protocol):
    """TRL's GRPO reward signature: one number for each completion, or None where the function does not apply.

    A list with one number for each of the completion's tokens rewards those tokens; its sum is the value. `prompts`
    and `completions` are texts (for chat data, message lists); `completion_ids` their token ids; every column of the
    data set arrives by name, aligned, `references` among them. `trainer_state` is a `transformers.TrainerState`;
    `log_metric(name, value)` and `log_extra(column, values)` log a number and a column. A function without
    `**kwargs` gets the arguments that it names. It may be `async`.
    """

    def __call__(self, prompts: list, completions: list, **columns: object) -> list[float | list[float] | None]:
        """Score the completions."""
        ...


@dataclass(frozen=True)
class Reward:
    """A reward function under the name it is logged by, with its weight in the score.

    With `score_scaling` reference PPO divides it by its standard deviation in the first rollout. Where the weight
    changes during training, `weight_schedule` says how, and `weight` is that of evaluations.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    score_scaling: str = "none"
    weight_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for weight in (self.weight, self.weight if self.weight_schedule is None else self.weight_schedule):
            check_schedule(f"ppo.rewards: the weight of {self.name!r}", weight, "must be finite", math.isfinite)
        check_score_scaling(self.name, self.score_scaling)


def as_rewards(functions: Reward | Callable | Sequence[Reward | Callable]) -> list[Reward]:
    """Turn functions into rewards with different names: the second `f` is logged as `f_2`."""
    functions = functions if isinstance(functions, Sequence) else [functions]
    rewards = [f if isinstance(f, Reward) else Reward(_name_of(f), f) for f in functions]
    return with_different_names(rewards)


def with_different_names(rewards: Sequence[Reward]) -> list[Reward]:
    """Number the rewards that share a name, from the second on: each is logged by its name."""
    names: set[str] = {reward.name for reward in rewards}
    different: dict[str, Reward] = {}
    for reward in rewards:
        name, number = reward.name, 2
        while name in different or (name != reward.name and name in names):
            name, number = f"{reward.name}_{number}", number + 1
        different[name] = replace(reward, name=name)
    return list(different.values())


def _name_of(function: Callable) -> str:
    named = inspect.isroutine(function) or inspect.isclass(function)
    return function.__name__ if named else type(function).__name__


def build_rewards(
    configs: Sequence[RewardConfig], language: str | None = None, learned: RewardFunction | None = None
) -> list[Reward]:
    """Look each reward up: `constant`, `learned`, a metric's name, or a function of the user's own.

    `learned` is the function of the reward of that name, whose model the caller has loaded.

    Raises:
        ValueError: an unknown name or option; a path that cannot be imported or is not callable.
    """
    rewards = [
        Reward(
            config.name,
            learned if config.name == LEARNED and learned else _function(config, language),
            config.last_weight,
            config.score_scaling,
            None if config.weight == config.last_weight else config.weight,
        )
        for config in configs
    ]
    for number, config in enumerate(configs):
        earlier = [other for other in configs[:number] if other.name == config.name]
        if any(other.options == config.options or config.name == LEARNED for other in earlier):
            names = ", ".join(each.name for each in configs)
            raise ValueError(f"ppo.rewards: each reward once, or with other options, found {names}")
    return with_different_names(rewards)


def _function(config: RewardConfig, language: str | None) -> RewardFunction:
    if config.name == "constant":
        return _make(constant_reward, config)
    if is_metric(config.name):
        return metric_reward(load_metric(config.name, language, **config.options))
    if config.name == "shuffled":
        raise ValueError(
            "ppo.rewards: 'shuffled' is no reward: control: true runs PPO once more with its scores shuffled, and "
            "ppo.shuffle_scores: true shuffles them"
        )
    if not is_user_code(config.name):
        names = ("constant", LEARNED, *METRIC_NAMES)
        raise ValueError(
            f"ppo.rewards: {config.name!r} is not one of {', '.join(names)}, nor a function of your own ({FORMS})"
            f"{did_you_mean(config.name, names)}"
        )
    try:
        function = load_user_object(config.name)
    except UserCodeError as error:
        raise ValueError(f"ppo.rewards: {error}") from error
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


@dataclass(frozen=True)
class RewardOutputs:
    """What the reward functions returned for a batch of completions.

    `weighted_sum [B]` is NaN for a completion that is to be skipped; `by_name` has each reward's values [B], NaN where
    a function returned None or failed; `by_token` has, by the name of a reward that returned a number for each token,
    those lists (None for a completion that got a single number); `failures` says by completion what went wrong; `log`
    has what the functions logged.
    """

    weighted_sum: Tensor
    by_name: dict[str, Tensor]
    by_token: dict[str, list[list[float] | None]]
    failures: Mapping[int, str] = field(default_factory=dict)
    log: RewardLog = field(default_factory=RewardLog)

    def token_scores(self, rewards: Sequence["Reward"], lengths: Sequence[int]) -> Tensor:
        """Spread the weighted sum over tokens, [B, longest]: at the tokens that a function names, else at the last."""
        spread = torch.zeros(len(lengths), max(lengths))
        last = torch.tensor(lengths) - 1
        for reward in rewards:
            lists = self.by_token.get(reward.name, [None] * len(lengths))
            for row, numbers in enumerate(lists):
                if numbers is not None:
                    spread[row, : len(numbers)] += reward.weight * torch.tensor(numbers)
            whole = torch.tensor([numbers is None for numbers in lists])
            values = self.by_name[reward.name].nan_to_num(0.0) * whole
            spread[torch.arange(len(lengths)), last] += reward.weight * values
        return spread


AS_THEY_ARE = Handling()


def compute_rewards(
    rewards: Sequence[Reward],
    prompts: list,
    completions: list,
    columns: dict[str, list],
    handling: Handling = AS_THEY_ARE,
    trainer_state: TrainerState | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> RewardOutputs:
    """Call every reward function, those that are `async` together, and weigh and add what they return.

    `meanwhile` runs while the `async` ones are waited for, after the others.

    A completion on which a function fails ends the run, has no score, or gets 0 from that function: `handling` says.
    The same holds for a completion that no reward applies to.

    Raises:
        RewardError: a function failed and `handling` is to stop; its result is not, for each completion, one number,
            None, or a list of one number for each of its tokens; it needs an argument that there is not; or no reward
            applies to a completion and `handling` is to stop.
    """
    by_name, by_token, failures = {}, {}, {}
    calls = [RewardCall(r.name, r.function, prompts, completions, columns, handling, trainer_state) for r in rewards]
    run_calls(calls, meanwhile)
    for reward, call in zip(rewards, calls, strict=True):
        result, failed = call.values, call.failures
        if any(is_per_token(value) for value in result):
            lists = token_values(reward.name, result, completions, columns["completion_ids"], failed, handling)
            by_token[reward.name] = lists
            result = [
                value if tokens is None else math.fsum(tokens) for value, tokens in zip(result, lists, strict=True)
            ]
        values = finite_values(reward.name, result, completions, failed, handling)
        by_name[reward.name] = torch.tensor(values, dtype=torch.float32)
        failures = failed | failures
    without = rows_without_reward(by_name, failures)
    weighted_sum = combine(rewards, by_name, [*failures, *(without if handling.on_error != "stop" else [])])
    if handling.on_error == "skip":
        weighted_sum[[*failures, *without]] = math.nan
    return RewardOutputs(weighted_sum, by_name, by_token, failures, merged_log([call.log for call in calls]))


def rows_without_reward(by_name: dict[str, Tensor], failures: Collection[int]) -> list[int]:
    """Return the completions for which every function returned None, without those that one failed on."""
    nothing = torch.stack(list(by_name.values())).isnan().all(0)
    return [row for row in nothing.nonzero().flatten().tolist() if row not in failures]


def as_completions(prompts: Sequence, texts: Sequence) -> list:
    """Completions as reward functions expect them: texts, or for chat prompts one assistant message each.

    What the data has as a list of messages already stays as it is.
    """
    return [
        text if isinstance(prompt, str) or not isinstance(text, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def combine(rewards: Sequence[Reward], by_name: dict[str, Tensor], failures: Collection[int] = ()) -> Tensor:
    """Weigh and add the values of the rewards, [B], that apply to each completion; one of `failures` may have none.

    Raises:
        RewardError: a completion that no reward applies to.
    """
    values = torch.stack([by_name[reward.name] for reward in rewards])
    weights = torch.tensor([reward.weight for reward in rewards]).unsqueeze(1)
    if nothing := rows_without_reward({reward.name: by_name[reward.name] for reward in rewards}, failures):
        raise RewardError(
            f"no reward applies to completion {nothing[0]}: every function returned None; return a number, or set "
            "ppo.on_reward_error to skip or zero"
        )
    return (values.nan_to_num(0.0) * weights).sum(0)


def check_rewards(
    rewards: Sequence[Reward], examples: dict[str, list], handling: Handling = AS_THEY_ARE
) -> RewardOutputs:
    """Score the completions of a few `examples` of the data, so that a broken reward stops the run before it trains.

    Whatever is done about failures later, a function that fails here would fail throughout; on empty texts, which
    stand for completions that the data has not, it may. A completion that no reward applies to is refused where
    `handling` would end the run for it.

    Raises:
        RewardError: as `compute_rewards`.
    """
    columns = {name: values for name, values in examples.items() if name not in ("prompt", "completion")}
    columns["completion_ids"] = [[0]] * len(examples["prompt"])
    answers = examples.get("completion")
    completions = as_completions(examples["prompt"], [""] * len(examples["prompt"]) if answers is None else answers)
    if handling.on_error != "stop":
        rewards = [*rewards, Reward("", constant_reward(0.0))]
    state = TrainerState(epoch=0.0, global_step=0, max_steps=1)
    handling = handling if answers is None else Handling("stop", handling.timeout)
    return compute_rewards(rewards, examples["prompt"], completions, columns, handling, state)
