"""Other decodings than the report's own: other numbers of beams, and the best of n samples."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import comb

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import Decoding, generate
from pipeline.models.prompts import encode_rows
from pipeline.models.text import decode
from pipeline.runtime.distributed import NOTHING_ELSE, gather_rows
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.seeds import derive_seed, keep_random_state


@dataclass(frozen=True)
class DecodedText:
    """A completion of test row `index`, without its figures."""

    index: int
    completion: str
    completion_ids: list[int]


@dataclass(frozen=True)
class DecodingScores:
    """One system under one decoding: corpus scores by metric, the mean reward, and the mean length in tokens."""

    system: str
    decoding: str
    metrics: dict[str, float]
    mean_reward: float | None
    length: float


@dataclass(frozen=True)
class BestOfN:
    """The best of 1, 2, ... n samples of one system, chosen by knowing the score.

    `curves` gives the expected best by name (the reward, the first metric's sentence score), one value for each n from
    1; `decoded` the same measure for the report's own `decoding` on the same prompts. Samples and decoded texts are
    not compared with each other: of one model, the greedy text often scores higher than its samples.
    """

    prompts: int
    temperature: float
    curves: dict[str, list[float]]
    decoded: dict[str, float]
    decoding: str


def expected_best(scores: Sequence[Sequence[float]]) -> list[float]:
    """Estimate the best of k of the n scores of a prompt, for k = 1 ... n, averaged over the prompts; `scores` [N, n].

    Drawn without replacement, the i-th smallest of n is the largest of k with probability C(i - 1, k - 1) / C(n, k):
    an unbiased estimate from every sample, as pass@k is (Chen et al. 2021, arXiv:2107.03374).
    """
    n = len(scores[0])
    table = torch.tensor(scores, dtype=torch.float64).sort(dim=1).values
    curve = []
    for k in range(1, n + 1):
        weights = torch.tensor([comb(i, k - 1) / comb(n, k) for i in range(n)], dtype=torch.float64)
        curve.append(float((table @ weights).mean()))
    return curve


def complete_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batches: BatchSize,
    seed: int | None = None,
) -> list[list[int]]:
    """Write one completion for each prompt (token ids), in smaller batches once memory has run out.

    `seed` is that of samples; it leaves torch's generators as they are.
    """

    def attempt(size: int) -> list[list[int]]:
        if seed is not None:
            torch.manual_seed(seed)
        return generate(model, tokenizer, prompts, decoding, size)

    with keep_random_state(seed is not None):
        return batches.run(attempt)


def decode_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    indices: Sequence[int],
    decoding: Decoding,
    batches: BatchSize,
    seed: int | None = None,
) -> list[DecodedText]:
    """Complete the prompts of `rows[indices]`; an index may stand there several times.

    `seed` is that of samples; it leaves torch's generators as they are.
    """
    prompts = encode_rows(tokenizer, rows.select(indices), model.config.is_encoder_decoder)
    ids = complete_prompts(model, tokenizer, prompts, decoding, batches, seed)
    return [DecodedText(*text) for text in zip(indices, decode(tokenizer, ids), ids, strict=True)]


def draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    copies: int,
    decoding: Decoding,
    batches: BatchSize,
    seed: int,
    during: AbstractContextManager = NOTHING_ELSE,
) -> list[DecodedText]:
    """Draw `copies` samples for each row, every process those of its groups of rows; all samples in order of the rows.

    Each group has a seed of its own, so the samples are the same for any number of processes. `during` is as in
    `gather_rows`.
    """
    samples, size = range(len(rows) * copies), sample_block_size(batches.initial, copies)

    def draw(block: Sequence[int]) -> list[DecodedText]:
        block_seed = derive_seed(seed, "evaluation samples", block[0] // size)
        asked = [number // copies for number in block]
        return decode_rows(model, tokenizer, rows, asked, decoding, batches, block_seed)

    return gather_rows([samples[start : start + size] for start in range(0, len(samples), size)], draw, during)


def sample_block_size(batch_size: int, copies: int) -> int:
    """Count the samples that are drawn under one seed: all of a prompt, of as many prompts as fit into a batch."""
    return max(1, batch_size // copies) * copies
