"""How many examples the training split of a task has, where that is known without loading it."""

from dataclasses import dataclass

from pipeline.tasks import parallel
from pipeline.tasks.types import TaskConfig


@dataclass(frozen=True)
class ExampleCounts:
    """Hold how many examples SFT trains on and how many prompts PPO draws from; None where a number is not known."""

    sft: int | None
    ppo: int | None


def count_examples(config: TaskConfig) -> ExampleCounts:
    """Count the training examples of a task; the lines of parallel text are read, other data are not opened.

    Raises:
        TaskError: parallel text that cannot be read.
    """
    if not isinstance(config, parallel.Config):
        return ExampleCounts(None, config.ppo_examples)
    rows = parallel.training_rows(config)
    return ExampleCounts(rows - (config.ppo_examples or 0), config.ppo_examples or rows)
