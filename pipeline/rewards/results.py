"""What reward functions may return, the errors for anything else, and what is done about a completion's failure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

ON_ERROR = ("stop", "skip", "zero")


class RewardError(ValueError):
    """A reward function failed, or returned something that is not one finite number for each completion."""


@dataclass(frozen=True)
class Handling:
    """What happens when a reward function fails on a completion: `ppo.on_reward_error` and `ppo.reward_timeout`.

    `on_error`: `stop` ends the run, `skip` leaves the completion without a score, `zero` counts 0 for that function.
    `timeout`: seconds that one call may take; None is any number.
    """

    on_error: str = "stop"
    timeout: float | None = None

    def note(self, failures: dict[int, str], index: int, sentence: str, cause: BaseException | None = None) -> None:
        """Enter the failure on completion `index`, the first one if there are several.

        Raises:
            RewardError: the sentence, where a failure is to stop the run.
        """
        if self.on_error == "stop":
            raise RewardError(sentence) from cause
        failures.setdefault(index, sentence)


def as_list(name: str, result: object, completions: list) -> Sequence[object]:
    """The result of a function as one value for each completion.

    Raises:
        RewardError: it is no list, or too long or too short, whatever is done about single failures.
    """
    if isinstance(result, Tensor | np.ndarray):
        is_column = result.shape == (len(completions), 1)  # as models give it: numbers, and no lists for tokens
        result = (result[:, 0] if is_column else result).tolist()
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__}, expected a list of {len(completions)} numbers"
        )
    if len(result) != len(completions):
        raise RewardError(
            f"reward {name!r} returned {len(result)} values, expected one for each of {len(completions)} completions"
        )
    return result


def is_per_token(value: object) -> bool:
    """Whether a completion's value is a list, with a number for each token."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0 and int(np.prod(value.shape)) != 1  # one element is a number, whatever its shape
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def token_values(
    name: str,
    result: Sequence[object],
    completions: list,
    completion_ids: Sequence[Sequence[int]],
    failures: dict[int, str],
    handling: Handling,
) -> list[list[float] | None]:
    """The per-token lists of a result; None where a completion got a single number, None, or is among `failures`.

    Raises:
        RewardError: a list of another length, or that holds no numbers; or numbers that `handling` does not bear.
    """
    lists: list[list[float] | None] = []
    for index, (value, ids) in enumerate(zip(result, completion_ids, strict=True)):
        if not is_per_token(value):
            lists.append(None)
            continue
        numbers = [as_number(item) for item in value]
        if len(numbers) != len(ids):
            raise RewardError(
                f"reward {name!r} returned a list of {len(numbers)} for completion {index} "
                f"({excerpt(completions[index])}), expected one number for each of its {len(ids)} tokens"
            )
        problem = (
            f"reward {name!r} returned {excerpt(value)} for completion {index} "
            f"({excerpt(completions[index])}), expected a finite number for each token"
        )
        if None in numbers:
            raise RewardError(problem)
        finite = all(map(math.isfinite, numbers))
        if not finite:
            handling.note(failures, index, problem)
        lists.append(numbers if finite else None)
    return lists


def finite_values(
    name: str, result: Sequence[object], completions: list, failures: dict[int, str], handling: Handling
) -> list[float]:
    """One number for each completion, NaN for None and for those that are, or come to be, among `failures`.

    Raises:
        RewardError: a value that is no number, or one that is not finite and `handling` does not bear.
    """
    values = []
    for index, (value, completion) in enumerate(zip(result, completions, strict=True)):
        if value is None or index in failures:
            values.append(math.nan)
            continue
        number = as_number(value)
        problem = (
            f"reward {name!r} returned {excerpt(value)} for completion {index} ({excerpt(completion)}), "
            "expected a finite number or None"
        )
        if number is None:
            raise RewardError(problem)
        if not math.isfinite(number):
            handling.note(failures, index, problem)
        values.append(number if math.isfinite(number) else math.nan)
    return values


def as_number(value: object) -> float | None:
    """A number of any library as a float; None for what is none, a text with digits included."""
    try:
        value = value.item() if isinstance(value, Tensor | np.ndarray) else value
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def excerpt(value: object) -> str:
    """At most 80 letters of something, as Python writes it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
