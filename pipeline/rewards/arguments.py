"""What a reward function is called with: the arguments that it names, and ways to log numbers and columns."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.rewards.results import RewardError, as_number, excerpt

# Figures of the trainer's own, those of its evaluations without `eval_`; `/` stands for all that follows it.
OWN_FIGURES = (
    *("objective/", "policy/", "loss/", "val/", "reward/", "reward_share/", "lr", "episode", "step"),
    *("reward", "length", "finished"),
)
OWN_COLUMNS = ("step", "prompt", "completion", "score", "reward/")  # of samples.jsonl


@dataclass(frozen=True)
class RewardLog:
    """What reward functions logged beside their rewards.

    `metrics` has the numbers of each name; `extras` has columns with one value for each completion, None where a
    function logged none.
    """

    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    extras: Mapping[str, Sequence[object]] = field(default_factory=dict)


class CallLog:
    """What one call of the reward `name` logs; its methods are the arguments `log_metric` and `log_extra`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metrics: list[tuple[object, object]] = []
        self.extras: dict[object, list[object]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; those of one name are averaged over the calls of a step and over all processes."""
        self.metrics.append((name, value))

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        """Log a column with a value for each completion of the call."""
        self.extras.setdefault(column, []).extend(values)

    def checked_metrics(self) -> list[tuple[str, float]]:
        """Return the logged numbers with their names.

        Raises:
            RewardError: a name that is no text or one of the trainer's own, or a value that is no number.
        """
        checked = []
        for name, value in self.metrics:
            number = as_number(value)
            if not isinstance(name, str) or number is None:
                raise RewardError(
                    f"reward {self.name!r} called log_metric({excerpt(name)}, {excerpt(value)}), expected a name and "
                    "a number"
                )
            if _is_own(name, OWN_FIGURES):
                raise RewardError(
                    f"reward {self.name!r} called log_metric({name!r}, ...), a figure of the trainer's own; log it "
                    "under another name"
                )
            checked.append((name, number))
        return checked

    def checked_extras(self, size: int) -> dict[str, list[object]]:
        """Return the logged columns, which have `size` values each.

        Raises:
            RewardError: a name that is no text or one of the trainer's own, or another number of values.
        """
        for column, values in self.extras.items():
            if not isinstance(column, str) or len(values) != size:
                raise RewardError(
                    f"reward {self.name!r} called log_extra({excerpt(column)}, ...) with {len(values)} values, "
                    f"expected a name and one value for each of {size} completions"
                )
            if _is_own(column, OWN_COLUMNS):
                raise RewardError(
                    f"reward {self.name!r} called log_extra({column!r}, ...), a column of the trainer's own; log it "
                    "under another name"
                )
        return self.extras


def _is_own(name: str, own: Sequence[str]) -> bool:
    return name in own or name.startswith(tuple(each for each in own if each.endswith("/")))


def matching_arguments(
    name: str, function: Callable, available: Mapping[str, object]
) -> tuple[list[object], dict[str, object]]:
    """Choose what the reward `name` is called with: all that is available, or only what it names without `**kwargs`.

    Returns:
        The arguments by position, for parameters that take no name, and all others by name.

    Raises:
        RewardError: the function needs an argument that is not available.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of a library in C, which does not say
        return [], dict(available)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in available]
    if missing:
        raise RewardError(
            f"reward {name!r} asks for {', '.join(map(repr, missing))}, which the data has no column for; a reward "
            f"gets {', '.join(available)}"
        )
    positional = [p.name for p in named if p.kind == p.POSITIONAL_ONLY and p.name in available]
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    wanted = available if takes_all else [p.name for p in named if p.name in available]
    return [available[key] for key in positional], {key: available[key] for key in wanted if key not in positional}
