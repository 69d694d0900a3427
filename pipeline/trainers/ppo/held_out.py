"""PPO's held-out figures: greedy answers that every process writes and scores for its share of the prompts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from pipeline.models.sequences import length_sorted_chunks
from pipeline.runtime.distributed import on_main, part_files


@dataclass(frozen=True)
class Answer:
    """A greedy completion of one held-out prompt: its row, text, score, rewards by name, tokens, and if it ended."""

    row: int
    text: str
    score: float
    rewards: dict[str, float]
    length: int
    finished: bool


def held_out_figures(
    lengths: Sequence[int],
    batch_size: int,
    answer: Callable[[list[int]], list[Answer]],
    metrics: Callable[[list[str]], dict[str, float]] | None,
    directory: Path,
) -> dict[str, float]:
    """The figures of the prompts with these lengths, on every process; `metrics` of all texts, in order, by name.

    `answer` gets rows that are alike in length, the same ones together for any number of processes. What a process
    wrote reaches the main one in `directory`.
    """
    blocks = [sorted(block.tolist()) for block in length_sorted_chunks(torch.tensor(lengths), batch_size)]
    with part_files(directory) as parts:
        lines = parts.shared_out("answers", blocks, lambda rows: [asdict(found) for found in answer(rows)])

        def figures() -> dict[str, float]:
            answers = [Answer(**line) for line in lines]
            named = metrics([found.text for found in answers]) if metrics else {}
            return summarise_answers(answers) | {f"eval_{name}": value for name, value in named.items()}

        return on_main(figures)


def summarise_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over the held-out prompts; a reward counts where it applies, and a score where there is one."""
    scores = [answer.score for answer in answers if answer.score == answer.score]
    values = {"eval_reward": fmean(scores) if scores else float("nan")}
    for name in answers[0].rewards:
        present = [answer.rewards[name] for answer in answers if answer.rewards[name] == answer.rewards[name]]
        values[f"eval_reward/{name}"] = fmean(present) if present else float("nan")
    values["eval_length"] = fmean(answer.length for answer in answers)
    values["eval_finished"] = fmean(answer.finished for answer in answers)
    return values
