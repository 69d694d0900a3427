"""One line of `ppo.rewards`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime.messages import did_you_mean
from pipeline.runtime.schedules import Schedule, check_schedule, schedule_values

SCORE_SCALING = ("none", "reference")


@dataclass(frozen=True)
class RewardConfig:
    """What PPO is rewarded for: a metric by name, `constant`, or the dotted path of a function; `options` go to it."""

    name: str  # a metric, learned, constant, or the dotted path of a function
    weight: Schedule = 1.0  # in the sum: a number, or [episodes, value] points with straight lines between
    # what goes to the reward; in a recipe the keys beside name and weight
    options: Mapping[str, Any] = field(default_factory=dict)
    # reference divides the reward by its standard deviation in the first rollout, before it is weighted
    score_scaling: str = "none"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("ppo.rewards: a reward needs a name")
        check_schedule(f"ppo.rewards: the weight of {self.name!r}", self.weight, "must be finite", math.isfinite)
        if not any(schedule_values(self.weight)):
            raise ValueError(f"ppo.rewards: {self.name!r} has weight 0, so it would change nothing: remove it")
        check_score_scaling(self.name, self.score_scaling)

    @property
    def last_weight(self) -> float:
        """The weight at the end of the run, by which held-out completions are compared in all of it."""
        return schedule_values(self.weight)[-1]


def check_score_scaling(name: str, value: object) -> None:
    """Refuse a `score_scaling` that a reward cannot have.

    Raises:
        ValueError: naming the reward, with the choices.
    """
    if value not in SCORE_SCALING:
        raise ValueError(
            f"ppo.rewards: the score_scaling of {name!r} must be one of {', '.join(SCORE_SCALING)}, found "
            f"{value!r}{did_you_mean(str(value), SCORE_SCALING)}"
        )
