"""The same reward for everything: the control run, which shows what PPO does without a signal."""

import math


def constant_reward(value: float = 1.0):
    """A reward function that gives `value` to every completion.

    Raises:
        ValueError: `value` is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"value must be a finite number, found {value!r}")

    def constant(prompts: list, completions: list, **columns: list) -> list[float]:
        return [value] * len(completions)

    return constant
