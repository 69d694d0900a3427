"""PPO's held-out figures: every process completes and scores its share of the prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from datasets import Dataset

from pipeline.models.generation import Decoding
from pipeline.models.sequences import length_sorted_chunks
from pipeline.runtime.distributed import gather_rows, on_main
from pipeline.runtime.seeds import derive_seed
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.rollout import CompletionWriter
from pipeline.trainers.ppo.scores import ComputeRewards

# Metrics of the held-out completions: (completions, the examples they answer) -> name -> value.
ComputeMetrics = Callable[[list[str], Dataset], dict[str, float]]


@dataclass(frozen=True)
class HeldOutData:
    """The held-out examples, and the token ids of each one's prompt."""

    examples: Dataset
    prompt_ids: Sequence[Sequence[int]]

    def repeated(self, copies: int) -> "HeldOutData":
        """Return the same with every example `copies` times, one after the other."""
        rows = [row for row in range(len(self.examples)) for _ in range(copies)]
        return HeldOutData(self.examples.select(rows), [self.prompt_ids[row] for row in rows])


@dataclass(frozen=True)
class HeldOutCompletion:
    """A completion of the held-out prompt in `row`; `length` is in tokens, `rewards` are by name."""

    row: int
    text: str
    score: float
    rewards: dict[str, float]
    length: int
    finished: bool


def evaluate_held_out(
    data: HeldOutData,
    args: PPOConfig,
    writer: CompletionWriter,
    seed: int,
    compute_rewards: ComputeRewards,
    compute_metrics: ComputeMetrics | None,
) -> dict[str, float]:
    """Complete the held-out prompts: each reward, their weighted sum, length, metrics.

    Each prompt has `args.num_generations_eval` completions: one is greedy, several are samples that follow from
    `seed`, the same for any number of processes.
    """
    copies = args.num_generations_eval
    repeated = data if copies == 1 else data.repeated(copies)
    decoding = args.greedy if copies == 1 else args.sampling

    def complete(rows: list[int]) -> list[HeldOutCompletion]:
        block_seed = None if copies == 1 else derive_seed(seed, "held-out samples", rows[0])
        return complete_held_out(rows, repeated, writer, decoding, compute_rewards, block_seed)

    metrics = None if compute_metrics is None else lambda texts: compute_metrics(texts, repeated.examples)
    lengths = [len(ids) for ids in repeated.prompt_ids]
    return held_out_figures(lengths, args.local_rollout_forward_batch_size, complete, metrics)


def complete_held_out(
    rows: list[int],
    data: HeldOutData,
    writer: CompletionWriter,
    decoding: Decoding,
    compute_rewards: ComputeRewards,
    sample_seed: int | None = None,
) -> list[HeldOutCompletion]:
    """Complete and score the prompts at `rows` of the held-out data."""
    completions = writer.write([data.prompt_ids[row] for row in rows], decoding, sample_seed, rank=0)
    rewards = compute_rewards(data.examples.select(rows), completions.texts, completions.ids)
    return [
        HeldOutCompletion(
            row,
            completions.texts[i],
            float(rewards.weighted_sum[i]),
            {name: float(values[i]) for name, values in rewards.by_name.items()},
            completions.lengths[i],
            bool(completions.finished[i]),
        )
        for i, row in enumerate(rows)
    ]


def held_out_figures(
    lengths: Sequence[int],
    batch_size: int,
    complete: Callable[[list[int]], list[HeldOutCompletion]],
    metrics: Callable[[list[str]], dict[str, float]] | None,
) -> dict[str, float]:
    """Compute the figures of held-out prompts with these lengths, on every process.

    `complete` gets rows that are alike in length, the same ones together for any number of processes; `metrics` gets
    all texts in order of the rows, on the main process.
    """
    blocks = [sorted(block.tolist()) for block in length_sorted_chunks(torch.tensor(lengths), batch_size)]
    completions = gather_rows(blocks, complete)

    def figures() -> dict[str, float]:
        values = metrics([completion.text for completion in completions]) if metrics else {}
        return mean_figures(completions) | {f"eval_{name}": value for name, value in values.items()}

    return on_main(figures)


def mean_figures(completions: Sequence[HeldOutCompletion]) -> dict[str, float]:
    """Average over the held-out completions; a reward is averaged where it applies, a score where there is one."""
    scores = [completion.score for completion in completions if completion.score == completion.score]
    values = {"eval_reward": fmean(scores) if scores else float("nan")}
    for name in completions[0].rewards:
        applicable = [c.rewards[name] for c in completions if c.rewards[name] == c.rewards[name]]
        values[f"eval_reward/{name}"] = fmean(applicable) if applicable else float("nan")
    values["eval_length"] = fmean(completion.length for completion in completions)
    values["eval_finished"] = fmean(completion.finished for completion in completions)
    return values
