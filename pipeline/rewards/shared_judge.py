"""A reward model's scores of many texts, every process giving those of its share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.sequences import length_sorted_chunks
from pipeline.runtime.distributed import Parts

# (prompts, texts, their token ids) -> raw scores [N]
Judge = Callable[[list, Sequence[str], Sequence[Sequence[int]]], Tensor]


@dataclass(frozen=True)
class SharedJudge:
    """`judge`, asked by every process about its share of the texts, `batch_size` texts alike in length at a time."""

    judge: Judge
    parts: Parts
    batch_size: int

    def scores(self, name: str, prompts: list, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tensor:
        """Raw scores [N] on the main process, [0] on the others; `name` is no other call's.

        Batches are the same for any number of processes, and so is every rounding.
        """
        lengths = torch.tensor([len(str(p)) + len(t) for p, t in zip(prompts, texts, strict=True)])
        blocks = [chunk.tolist() for chunk in length_sorted_chunks(lengths, self.batch_size)]

        def work(rows: Sequence[int]) -> list[float]:
            return self.judge([prompts[r] for r in rows], [texts[r] for r in rows], [ids[r] for r in rows]).tolist()

        return torch.tensor(self.parts.shared_out(name, blocks, work))
