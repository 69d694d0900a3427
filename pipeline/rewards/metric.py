"""A metric as a reward: its sentence score against the references, in [0, 1] for the built-in ones."""

from pipeline.metrics import Metric


def text_of(completion: object) -> str:
    """The text of a completion, which for chat data is a list with one assistant message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def metric_reward(metric: Metric):
    """A reward function that scores each completion by `metric` against the column `references`."""

    def reward(prompts: list, completions: list, *, references: list[list[str]], **columns: list) -> list[float]:
        return metric.sample_scores([text_of(completion) for completion in completions], references)

    return reward
