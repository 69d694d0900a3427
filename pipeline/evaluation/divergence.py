"""How far a system is from SFT, and how much it varies: KL and entropy over samples of its own.

Both are expectations under the system itself, at the temperature at which PPO samples: along greedy text they would be
smaller. A sample gives the sum over its positions of the KL and of the entropy over the whole vocabulary, which has
the expectation of the log ratio that PPO logs as `objective/kl`, and scatters less.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import sqrt

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.decodings import complete_prompts
from pipeline.models.generation import Decoding
from pipeline.models.likelihood import entropy_and_divergence
from pipeline.models.prompts import encode_rows
from pipeline.models.sequences import Sequences, length_sorted_blocks, make_sequences
from pipeline.models.speech import forbidden_tokens
from pipeline.runtime.devices import in_float64
from pipeline.runtime.distributed import NOTHING_ELSE, gather_rows
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.seeds import derive_seed

MEASURED_PROMPTS = 1000  # test prompts that are answered by one sample each


@dataclass(frozen=True)
class SampleMeasure:
    """One sample of a system: its length, and its entropy and KL(system || SFT), in nats, summed over its tokens.

    The KL is None where there is no SFT model with the same vocabulary.
    """

    tokens: int
    entropy: float
    kl_to_sft: float | None


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is None where a single sample gives none."""

    value: float
    error: float | None


def measured_rows(count: int) -> list[int]:
    """Choose which of `count` test rows are answered by a sample: all, or `MEASURED_PROMPTS` at even distances."""
    measured = min(count, MEASURED_PROMPTS)
    return [count * number // measured for number in range(measured)]


def measure_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    decoding: Decoding,
    batches: BatchSize,
    seed: int,
    sft: PreTrainedModel | None = None,
    during: AbstractContextManager = NOTHING_ELSE,
) -> list[SampleMeasure]:
    """Draw a sample for each row at the temperature of `decoding`, and measure it, in order of the rows.

    Every process takes its blocks of rows. Each block has a seed of its own, so the samples are the same for any
    number of processes. `during` is as in `gather_rows`.
    """
    prompts = encode_rows(tokenizer, rows, model.config.is_encoder_decoder)
    decoding = decoding.with_forbidden(forbidden_tokens(model))

    def measure(block: Sequence[int]) -> list[SampleMeasure]:
        asked = [prompts[row] for row in block]
        block_seed = derive_seed(seed, "samples for KL and entropy", block[0])
        samples = complete_prompts(model, tokenizer, asked, decoding, batches, block_seed)
        sequences = make_sequences(asked, samples, tokenizer.pad_token_id, model.device)
        entropies, divergences = batches.run(lambda size: completion_sums(model, sequences, decoding, size, sft))
        kls = divergences.tolist() if sft is not None else [None] * len(block)
        return [SampleMeasure(*figures) for figures in zip(map(len, samples), entropies.tolist(), kls, strict=True)]

    return gather_rows(length_sorted_blocks([len(ids) for ids in prompts], batches.initial), measure, during)


def completion_sums(
    model: PreTrainedModel, sequences: Sequences, decoding: Decoding, size: int, sft: PreTrainedModel | None
) -> Tensor:
    """Sum the entropy and KL(model || sft) over each completion, [2, B] in float64; KL is 0 without another model."""
    sums = torch.zeros(2, len(sequences), dtype=torch.float64)
    other = None if sft is model else sft
    for index in sequences.chunks(size):
        rows = sequences.rows(index)
        never = (decoding.suppress_tokens, decoding.begin_suppress_tokens)
        values = entropy_and_divergence(model, rows, decoding.temperature, other, *never)
        sums[:, index.cpu()] = in_float64(torch.stack(values)).sum(2).cpu()
    return sums


def kl_estimate(samples: Sequence[SampleMeasure]) -> Estimate | None:
    """Estimate KL(system || SFT) in nats a completion; None where a sample has none."""
    values = [sample.kl_to_sft for sample in samples if sample.kl_to_sft is not None]
    return _ratio(values, [1] * len(values)) if values else None


def entropy_estimate(samples: Sequence[SampleMeasure]) -> Estimate:
    """Estimate the entropy in nats a token, over all tokens of the samples."""
    return _ratio([sample.entropy for sample in samples], [sample.tokens for sample in samples])


def _ratio(values: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Estimate a ratio of sums; its error is that of the residuals (linearisation), samples being independent."""
    n, total = len(values), sum(sizes)
    ratio = sum(values) / total
    if n < 2:
        return Estimate(ratio, None)
    residuals = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return Estimate(ratio, sqrt(n / (n - 1) * residuals) / total)
