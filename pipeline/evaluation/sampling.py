"""What other decodings would have bought: beams of other widths, and the best of n samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import Decoding, generate
from pipeline.models.text import decode, encode_prompts
from pipeline.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Text:
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
    1; `decoded` the same measure for the report's own decoding on the same prompts.
    """

    prompts: int
    temperature: float
    curves: dict[str, list[float]]
    decoded: dict[str, float]


def expected_best(scores: Sequence[Sequence[float]]) -> list[float]:
    """The expected best of k of the n scores of a prompt, for k = 1 ... n, averaged over the prompts; `scores` [N, n].

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


def decode_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    indices: Sequence[int],
    decoding: Decoding,
    batch_size: int,
) -> list[Text]:
    """Completions of `rows[indices]` under another decoding than the report's."""
    if not indices:
        return []
    prompts = encode_prompts(tokenizer, rows.select(indices)["prompt"], model.config.is_encoder_decoder)
    ids = generate(model, tokenizer, prompts, decoding, batch_size)
    return [Text(*text) for text in zip(indices, decode(tokenizer, ids), ids, strict=True)]


def draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    copies: int,
    decoding: Decoding,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> list[Text]:
    """`copies` samples of each row, in order, of every `world`-th group of rows.

    Each group has a seed of its own, so the samples are the same for any number of processes.
    """
    size, found = max(1, batch_size // copies), []
    starts = range(0, len(rows), size)
    for number in range(rank, len(starts), world):
        indices = [i for i in range(starts[number], min(starts[number] + size, len(rows))) for _ in range(copies)]
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "evaluation samples", number))
            found += decode_rows(model, tokenizer, rows, indices, decoding, batch_size)
    return found
