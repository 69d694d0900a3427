"""Raw scores of many texts by a reward model, which every process computes for its share."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.reward_model import RewardRecord
from pipeline.models.sequences import length_sorted_chunks
from pipeline.rewards.classifier import ClassifierReward
from pipeline.runtime.distributed import gather_rows

# (prompts, texts, their token ids) -> raw scores [N]
RawScorer = Callable[[list, Sequence[str], Sequence[Sequence[int]]], Tensor]


@dataclass(frozen=True)
class UncalibratedReward:
    """A reward model before it is evaluated: its record without figures, how it scores, what its training came to.

    Of a sharded one every process scores in a block of `gathered()`.
    """

    record: RewardRecord
    scorer: RawScorer
    summary: Mapping[str, object] = field(default_factory=dict)
    gathered: Callable[[], AbstractContextManager] = nullcontext


def load_classifier(path: str, config: ModelConfig, template: str | None, batch_size: int) -> UncalibratedReward:
    """Load a sequence classifier as a reward model that is used without training."""
    classifier = ClassifierReward(path, config, template, batch_size).to(PartialState().device)

    def scorer(prompts: list, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tensor:
        return classifier.raw_scores(prompts, texts)

    return UncalibratedReward(RewardRecord("classifier", path, 0.0, 1.0, None, 0, template=template), scorer)


def gather_raw_scores(
    reward: UncalibratedReward, prompts: list, texts: Sequence[str], ids: Sequence[Sequence[int]], batch_size: int
) -> Tensor:
    """Compute the raw scores [N] of texts, in batches of `batch_size` texts alike in length; all of them everywhere.

    Batches are the same for any number of processes, and so is the rounding. Every process calls this.
    """
    lengths = torch.tensor([len(str(p)) + len(t) for p, t in zip(prompts, texts, strict=True)])
    blocks = [chunk.tolist() for chunk in length_sorted_chunks(lengths, batch_size)]

    def compute(block: Sequence[int]) -> list[float]:
        rows = ([prompts[r] for r in block], [texts[r] for r in block], [ids[r] for r in block])
        return reward.scorer(*rows).tolist()

    return torch.tensor(gather_rows(blocks, compute, reward.gathered()))
