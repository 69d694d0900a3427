"""Collect pairs: from samples of the SFT model, drawn and ranked by every process, or from preference data."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.metrics import Metric
from pipeline.models.generation import Decoding, generate
from pipeline.models.loading import position_limit
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.text import decode, encode_completions, encode_prompts, plain_text
from pipeline.rewards.pairs import HELD_OUT, Pair, RankedText, prompt_pairs
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.distributed import NOTHING_ELSE, gather_rows
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.seeds import derive_seed, keep_random_state

BLOCK = 256  # prompts whose samples are drawn under one seed
DECODER_PREFIX = 2  # tokens a decoder starts from: start token and language code


@dataclass(frozen=True)
class RankedSample:
    """One distinct sample for the prompt in `row` of a split, its token ids, and its value by the ranking metric."""

    split: str
    row: int
    text: str
    ids: list[int]
    value: float


def sample_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    split: str,
    settings: SampledPairs,
    metric: Metric,
    seed: int,
    strip_thoughts: bool = False,
    during: AbstractContextManager = NOTHING_ELSE,
) -> tuple[list[Pair], list[RankedSample]]:
    """Sample completions of every prompt of `rows` and pair them; all pairs and samples, on every process.

    Samples are given of held-out prompts alone.

    Every process draws and ranks the samples of its blocks of prompts. Each block has a seed of its own, so the
    samples are the same for any number of processes. `during` is as in `gather_rows`.
    """

    batches = BatchSize(settings.batch_size)

    def collect(block: Sequence[int]) -> list[tuple[list[Pair], list[RankedSample]]]:
        drawn_with = derive_seed(seed, f"sampled pairs of {split}", block[0])
        given = (rows.select(block), settings, metric, strip_thoughts)
        drawn = _draw_samples(model, tokenizer, *given, batches, drawn_with)
        return _pair_samples(tokenizer, rows, block, drawn, split, settings, metric)

    blocks = [range(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK)]
    by_prompt = gather_rows(blocks, collect, during)
    return [pair for pairs, _ in by_prompt for pair in pairs], [s for _, samples in by_prompt for s in samples]


def _pair_samples(
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    block: Sequence[int],
    drawn: Sequence[Sequence[RankedText]],
    split: str,
    settings: SampledPairs,
    metric: Metric,
) -> list[tuple[list[Pair], list[RankedSample]]]:
    """Pair the `drawn` samples of each prompt of `rows[block]` with each other and with its first reference."""
    chosen = rows.select(block)
    references = [texts[0] for texts in chosen["references"]]
    values = metric.sample_scores(references, list(chosen["references"]))
    ids = encode_completions(tokenizer, chosen["prompt"], references)
    by_prompt = []
    for number, (row, prompt) in enumerate(zip(block, chosen["prompt"], strict=True)):
        reference = RankedText(references[number], ids[number], values[number])
        pairs = prompt_pairs(settings, prompt, split, row, drawn[number], [reference])
        distinct = {sample.text: sample for sample in drawn[number]}.values() if split == HELD_OUT else ()
        by_prompt.append((pairs, [RankedSample(split, row, s.text, s.ids, s.value) for s in distinct]))
    return by_prompt


def _draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: SampledPairs,
    metric: Metric,
    strip_thoughts: bool,
    batches: BatchSize,
    seed: int,
) -> list[list[RankedText]]:
    """Draw `settings.samples` completions of each prompt and compute their values by the ranking metric."""
    decoding = Decoding(
        settings.max_new_tokens,
        settings.temperature,
        top_p=settings.top_p,
        min_new_tokens=settings.min_new_tokens,
        stop_strings=settings.stop_strings,
        suppress_tokens=settings.suppress_tokens,
    )
    prompts = encode_prompts(tokenizer, rows["prompt"], model.config.is_encoder_decoder)
    check_prompt_lengths(
        prompts, settings.max_new_tokens, model.config, "reward.pairs.max_new_tokens", "a block of rows"
    )
    count = settings.samples
    repeated = [p for p in prompts for _ in range(count)]

    def draw(size: int) -> list[list[int]]:
        with keep_random_state():
            torch.manual_seed(seed)
            return generate(model, tokenizer, repeated, decoding, size)

    ids = batches.run(draw)
    texts = decode(tokenizer, ids, strip_thoughts)
    if strip_thoughts:  # the tokens of what is left, as PPO shows it to the reward model
        asked = [prompt for prompt in rows["prompt"] for _ in range(count)]
        fresh, whole = encode_completions(tokenizer, asked, texts), decode(tokenizer, ids)
        ids = [new if text != raw else old for new, old, text, raw in zip(fresh, ids, texts, whole, strict=True)]
    values = metric.sample_scores(texts, [references for references in rows["references"] for _ in range(count)])
    samples = [RankedText(*sample) for sample in zip(texts, ids, values, strict=True)]
    return [samples[start : start + count] for start in range(0, len(samples), count)]


def data_pairs(tokenizer: PreTrainedTokenizerBase, split: str, preferences: Sequence) -> list[Pair]:
    """Make pairs of preference data, tokenised as the policy's completions are."""
    prompts = [preference.prompt for preference in preferences]
    sides = [
        encode_completions(tokenizer, prompts, [getattr(preference, side) for preference in preferences])
        for side in ("chosen", "rejected")
    ]
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(str(prompt), len(numbers)) for prompt in prompts]
    return [
        Pair(split, row, p.prompt, p.chosen, p.rejected, chosen, rejected, p.margin, "data")
        for row, p, chosen, rejected in zip(rows, preferences, *sides, strict=True)
    ]


def context_check(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> Callable[[Pair], bool]:
    """Return a function that tells whether the model's context holds the prompt and the longer text of a pair."""
    limit = position_limit(config)
    prompts = {plain_text(pair.prompt): pair.prompt for pair in pairs}
    encoded = encode_prompts(tokenizer, list(prompts.values()), config.is_encoder_decoder)
    lengths = dict(zip(prompts, map(len, encoded), strict=True))

    def fits(pair: Pair) -> bool:
        prompt, text = lengths[plain_text(pair.prompt)], max(len(pair.chosen_ids), len(pair.rejected_ids))
        # Encoder and decoder have positions of their own.
        needed = max(prompt, text + DECODER_PREFIX) if config.is_encoder_decoder else prompt + text
        return limit is None or needed <= limit

    return fits
