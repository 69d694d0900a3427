"""Dynamic sampling: prompts whose completions all score the same make room for others (Yu et al. 2025, DAPO)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset

from pipeline.models.generation import Completions
from pipeline.models.sequences import Sequences
from pipeline.rewards import RewardOutputs
from pipeline.rewards.arguments import RewardLog
from pipeline.rewards.calling import merged_log
from pipeline.runtime.seeds import derive_seed
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.rollout import TokenOutputs

SAME = 1e-8  # scores that differ by less are the same


@dataclass(frozen=True)
class Answers:
    """Completions to the prompts in `rows` of a data set, those of one prompt side by side, and their rewards.

    `passes` is what the models compute for their tokens, where that has been done.
    """

    dataset: Dataset
    rows: Sequence[int]
    completions: Completions
    rewards: RewardOutputs
    passes: tuple[Sequences, TokenOutputs] | None = None

    @property
    def examples(self) -> Dataset:
        """The examples that are answered."""
        return self.dataset.select(self.rows)


# (training rows, seed) -> their completions and rewards
Answer = Callable[[Sequence[int], int], Answers]


def resample(answers: Answers, answer: Answer, args: PPOConfig, seed: int, rank: int) -> Answers:
    """Replace groups of completions without a signal by those of other prompts, in `dynamic_sampling_rounds` at most.

    The other prompts are drawn from all training rows by `seed`, the round and the process: a resumed run draws the
    same. Processes do not wait for each other. Groups that never get a signal stay as they are.
    """
    size, num_rows = args.num_generations, len(answers.dataset)
    for number in range(args.dynamic_sampling_rounds):
        groups = groups_without_signal(answers.rewards.weighted_sum, size)
        if not groups:
            break
        own_seed = derive_seed(seed, "dynamic sampling", number, rank)
        generator = torch.Generator().manual_seed(own_seed)
        drawn = torch.randint(num_rows, (len(groups),), generator=generator).tolist()
        fresh = answer([row for row in drawn for _ in range(size)], own_seed)
        answers = put_in(answers, fresh, [group * size + i for group in groups for i in range(size)])
    return answers


def groups_without_signal(scores: torch.Tensor, size: int) -> list[int]:
    """Return the numbers of the groups of `size` neighbours whose `scores [B]` are the same; NaN is no score."""
    groups = scores.view(-1, size)
    highest = groups.nan_to_num(nan=-torch.inf).amax(1)
    lowest = groups.nan_to_num(nan=torch.inf).amin(1)
    return (~(highest - lowest > SAME)).nonzero().flatten().tolist()


def put_in(answers: Answers, fresh: Answers, positions: Sequence[int]) -> Answers:
    """Return the answers with `fresh` ones at `positions`."""

    def listed(before: Sequence, after: Sequence) -> list:
        values = list(before)
        for position, value in zip(positions, after, strict=True):
            values[position] = value
        return values

    def tensors(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return before.index_copy(0, torch.tensor(positions), after)

    old, new, count = answers.rewards, fresh.rewards, len(answers.rows)
    kept = {row: text for row, text in old.failures.items() if row not in set(positions)}
    none, no_news = [None] * count, [None] * len(positions)
    rewards = replace(
        old,
        weighted_sum=tensors(old.weighted_sum, new.weighted_sum),
        by_name={name: tensors(values, new.by_name[name]) for name, values in old.by_name.items()},
        by_token={
            name: listed(old.by_token.get(name, none), new.by_token.get(name, no_news))
            for name in {**old.by_token, **new.by_token}
        },
        failures=kept | {positions[row]: text for row, text in new.failures.items()},
        log=RewardLog(
            merged_log([old.log, new.log]).metrics,
            {
                name: listed(old.log.extras.get(name, none), new.log.extras.get(name, no_news))
                for name in {**old.log.extras, **new.log.extras}
            },
        ),
    )
    completions = Completions(
        listed(answers.completions.ids, fresh.completions.ids),
        listed(answers.completions.texts, fresh.completions.texts),
        tensors(answers.completions.finished, fresh.completions.finished),
    )
    return Answers(answers.dataset, listed(answers.rows, fresh.rows), completions, rewards)
