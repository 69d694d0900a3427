"""Compute rewards of completions to the prompts of a data set, and count those that failed."""

from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import TrainerState

from pipeline.rewards import Handling, Reward, RewardOutputs, as_completions, compute_rewards
from pipeline.runtime.messages import one_line


def compute_row_rewards(
    rewards: Sequence[Reward],
    rows: Dataset,
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    handling: Handling,
    trainer_state: TrainerState | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> RewardOutputs:
    """Compute the rewards of completions (one for each row) to the prompts of `rows`.

    Every other column of `rows` reaches the reward functions by name.
    """
    columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", "completion")}
    columns["completion_ids"] = list(completion_ids)
    prompts = list(rows["prompt"])
    given = (prompts, as_completions(prompts, completions), columns, handling, trainer_state)
    return compute_rewards(rewards, *given, meanwhile)


def count_failures(failures: Sequence[str], on_error: str) -> str:
    """Say in a sentence how many scores failed, and why the first one did."""
    what = "counted as 0" if on_error == "zero" else "left out"
    scores = "score" if len(failures) == 1 else "scores"
    return one_line(f"{len(failures)} {scores} {what} (ppo.on_reward_error): {failures[0]}")
