"""The same reward for everything: the control run, which shows what PPO does without a signal."""


def constant_reward(value: float = 1.0):
    """A reward function that gives `value` to every completion."""

    def constant(prompts: list, completions: list, **columns: list) -> list[float]:
        return [value] * len(completions)

    return constant
