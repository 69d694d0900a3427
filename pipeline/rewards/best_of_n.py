"""Best-of-n distillation: sample completions of every prompt and keep the one with the best reward, for SFT to learn.

Source: Stiennon et al., Learning to summarize from human feedback (2020), for the best of n; Touvron et al., Llama 2:
Open Foundation and Fine-Tuned Chat Models (2023), section 3.2.3, for learning it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import finished, generate
from pipeline.models.prompts import encode_rows
from pipeline.models.sampling import Decoding
from pipeline.models.text import decode, without_thoughts
from pipeline.rewards import Handling, Reward
from pipeline.rewards.rows import compute_row_rewards
from pipeline.runtime.distributed import gather_rows
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.seeds import derive_seed, keep_random_state

REFERENCES, BEST_OF_N = "references", "best_of_n"  # the choices of `sft.from`
BLOCK = 32  # prompts whose samples are drawn under one seed


@dataclass(frozen=True)
class BestOfNSettings:
    """The keys of `sft` with `from: best_of_n`: how many samples of each prompt, and how they are drawn."""

    samples: int = 4  # completions of each prompt, of which SFT learns the best
    temperature: float = 1.0  # of the samples
    sample_batch_size: int = 64  # completions that are written at once

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"sft.samples: must be at least 2, found {self.samples}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"sft.temperature: must be above 0, found {self.temperature}")
        if self.sample_batch_size < 1:
            raise ValueError(f"sft.sample_batch_size: must be at least 1, found {self.sample_batch_size}")


@dataclass(frozen=True)
class BestSample:
    """The best sample for the prompt in `row`, its reward, and the mean reward of that prompt's samples."""

    row: int
    text: str
    reward: float
    mean: float


def best_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: BestOfNSettings,
    decoding: Decoding,
    rewards: Sequence[Reward],
    handling: Handling,
    seed: int,
    strip_thoughts: bool = False,
) -> list[BestSample]:
    """Return the best sample of each prompt of `rows`, in order, on every process.

    A sample that did not end, is empty or has no reward is not learnt, and a prompt without another one is left out.
    Each block of prompts has a seed of its own, so the samples are the same for any number of processes.
    """
    count, batches = config.samples, BatchSize(config.sample_batch_size)
    decoding = replace(decoding, temperature=config.temperature)

    def collect(block: Sequence[int]) -> list[BestSample | None]:
        chosen = rows.select(block)
        repeated = rows.select([row for row in block for _ in range(count)])
        prompts = encode_rows(tokenizer, chosen, model.config.is_encoder_decoder)
        prompts = [prompt for prompt in prompts for _ in range(count)]
        drawn_with = derive_seed(seed, "best of n", block[0])

        def draw(size: int) -> list[list[int]]:
            with keep_random_state():
                torch.manual_seed(drawn_with)
                return generate(model, tokenizer, prompts, decoding, size)

        ids = batches.run(draw)
        texts, ended = decode(tokenizer, ids), finished(model, tokenizer, ids, decoding)
        scored = [without_thoughts(text) for text in texts] if strip_thoughts else texts
        values = compute_row_rewards(rewards, repeated, scored, ids, handling).weighted_sum.tolist()
        usable = [done and bool(text.strip()) for done, text in zip(ended, scored, strict=True)]
        by_prompt = [range(start, start + count) for start in range(0, len(texts), count)]
        return [
            _best(row, [(values[i], texts[i], usable[i]) for i in numbers])
            for row, numbers in zip(block, by_prompt, strict=True)
        ]

    blocks = [range(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK)]
    return [sample for sample in gather_rows(blocks, collect) if sample is not None]


def _best(row: int, samples: Sequence[tuple[float, str, bool]]) -> BestSample | None:
    """Return the usable sample with the highest reward, the first of equals; None where no sample is usable."""
    rewarded = [sample for sample in samples if not math.isnan(sample[0])]
    usable = [(value, text) for value, text, is_usable in rewarded if is_usable]
    if not usable:
        return None
    value, text = max(usable, key=lambda sample: sample[0])
    return BestSample(row, text, value, sum(value for value, _, _ in rewarded) / len(rewarded))
