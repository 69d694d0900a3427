"""PPO's held-out figures: every process completes and scores its share of the prompts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean

import torch
from datasets import Dataset

from pipeline.models.generation import Completions, Decoding
from pipeline.models.sequences import length_sorted_chunks
from pipeline.rewards import RewardError, RewardOutputs
from pipeline.runtime.distributed import NOTHING_ELSE, gather_rows, on_main
from pipeline.runtime.seeds import derive_seed
from pipeline.runtime.watchdog import make_progress
from pipeline.trainers.ppo.checks import check_prompt_ids
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.inputs import EvalData, held_out_sets
from pipeline.trainers.ppo.rollout import CompletionWriter
from pipeline.trainers.ppo.scores import ComputeRewards
from pipeline.trainers.ppo.statistics import named_metrics

# Metrics of the held-out completions: (completions, the examples they answer) -> name -> value.
ComputeMetrics = Callable[[list[str], Dataset], dict[str, float]]

# Writes a completion for each of a list of token ids; for samples it also gets their seed and a rank.
Write = Callable[..., Completions]


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


class RewardMetrics:
    """The numbers that reward functions log in several calls, by name."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}

    def kept(self, compute_rewards: ComputeRewards) -> ComputeRewards:
        """Compute the same, and keep what is logged."""

        def compute(
            examples: Dataset, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
        ) -> RewardOutputs:
            outputs = compute_rewards(examples, completions, completion_ids)
            for name, numbers in outputs.log.metrics.items():
                self.metrics.setdefault(name, []).extend(numbers)
            return outputs

        return compute


class HeldOutEvaluator:
    """Compute the figures of held-out prompts with the current policy."""

    def __init__(
        self, writer: CompletionWriter, args: PPOConfig, seed: int, compute_metrics: ComputeMetrics | None
    ) -> None:
        self.writer, self.args, self.seed, self.compute_metrics = writer, args, seed, compute_metrics

    def encode(self, eval_dataset: EvalData | None) -> dict[str, HeldOutData]:
        """Tokenise the prompts of each set, by its name.

        Raises:
            ValueError: as `held_out_sets` and `check_prompt_ids`.
        """
        sets = held_out_sets(eval_dataset, self.args)
        held_out = {name: HeldOutData(examples, self.writer.encode(examples)) for name, examples in sets.items()}
        for name, data in held_out.items():
            split = f"eval_dataset[{name!r}]" if name else "eval_dataset"
            model = self.writer.shared.language_model
            check_prompt_ids(data.prompt_ids, self.args.response_length, model, split)
        return held_out

    def figures(
        self, held_out: Mapping[str, HeldOutData], compute_rewards: ComputeRewards, prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the figures of every set, named `<prefix>_<figure>`, or `<prefix>_<set>_<figure>` if it has a name.

        Of sets with names `<prefix>_reward` is the mean of their rewards.

        Raises:
            ValueError: there is no set, or an empty one.
        """
        if not held_out or not all(len(data.examples) for data in held_out.values()):
            raise ValueError("eval_dataset: no examples to evaluate; give them to PPOTrainer or to evaluate()")
        values, rewards = {}, []
        for name, data in held_out.items():
            start = f"{prefix}_{name}" if name else prefix
            for key, value in self._figures_of(data, compute_rewards).items():
                values[f"{start}_{key.removeprefix('eval_')}"] = value
            rewards.append(values[f"{start}_reward"])
        return {f"{prefix}_reward": fmean(rewards)} | values

    def _figures_of(self, data: HeldOutData, compute_rewards: ComputeRewards) -> dict[str, float]:
        """Complete the prompts of a set: each reward, their weighted sum, length, metrics.

        Each prompt has `num_generations_eval` completions: one is greedy, several are samples that follow from the
        seed, the same at every step and for any number of processes.

        Raises:
            RewardError: a reward logs a number under the name of a metric.
        """
        args, compute_metrics = self.args, self.compute_metrics
        copies, logged = args.num_generations_eval, RewardMetrics()
        repeated = data if copies == 1 else data.repeated(copies)
        decoding = args.greedy if copies == 1 else args.sampling

        keep, seed = logged.kept(compute_rewards), None if copies == 1 else self.seed
        size, write = args.local_rollout_forward_batch_size, self.writer.write
        during = self.writer.gathered()
        figures = evaluate_held_out(repeated, size, write, decoding, keep, compute_metrics, seed, during)
        named = named_metrics(logged.metrics, "eval_")
        if taken := sorted(figures.keys() & named.keys()):
            name = taken[0].removeprefix("eval_")
            raise RewardError(
                f"a reward called log_metric({name!r}, ...), a metric of the evaluation; use another name"
            )
        return figures | named


def evaluate_held_out(
    data: HeldOutData,
    batch_size: int,
    write: Write,
    decoding: Decoding,
    compute_rewards: ComputeRewards,
    compute_metrics: ComputeMetrics | None,
    seed: int | None = None,
    during: AbstractContextManager = NOTHING_ELSE,
) -> dict[str, float]:
    """Complete the held-out prompts, `batch_size` at once: each reward, their weighted sum, length, metrics.

    Samples follow from `seed`, the same for any number of processes. `during` is as in `gather_rows`.
    """

    def complete(rows: list[int]) -> list[HeldOutCompletion]:
        block_seed = None if seed is None else derive_seed(seed, "held-out samples", rows[0])
        return complete_held_out(rows, data, write, decoding, compute_rewards, block_seed)

    metrics = None if compute_metrics is None else lambda texts: compute_metrics(texts, data.examples)
    return held_out_figures([len(ids) for ids in data.prompt_ids], batch_size, complete, metrics, during)


def complete_held_out(
    rows: list[int],
    data: HeldOutData,
    write: Write,
    decoding: Decoding,
    compute_rewards: ComputeRewards,
    sample_seed: int | None = None,
) -> list[HeldOutCompletion]:
    """Complete and score the prompts at `rows` of the held-out data."""
    make_progress()  # a whole evaluation may take longer than a process is waited for
    ids = [data.prompt_ids[row] for row in rows]
    completions = write(ids, decoding) if sample_seed is None else write(ids, decoding, sample_seed, 0)
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
    during: AbstractContextManager = NOTHING_ELSE,
) -> dict[str, float]:
    """Compute the figures of held-out prompts with these lengths, on every process; `during` is as in `gather_rows`.

    `complete` gets rows that are alike in length, the same ones together for any number of processes; `metrics` gets
    all texts in order of the rows, on the main process.
    """
    blocks = [sorted(block.tolist()) for block in length_sorted_chunks(torch.tensor(lengths), batch_size)]
    completions = gather_rows(blocks, complete, during)

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
