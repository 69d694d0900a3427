"""Pairs from the SFT model's own samples: seeded by block of prompts, the same for any number of processes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.metrics import Metric
from pipeline.models.generation import Decoding, generate
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.text import decode, encode_completions, encode_prompts
from pipeline.rewards.pairs import Pair, Text, prompt_pairs
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.distributed import Parts
from pipeline.runtime.seeds import derive_seed

BLOCK = 256  # prompts that are answered under one seed


@dataclass(frozen=True)
class Sample:
    """One distinct answer to the prompt in `row` of a split, its token ids, and the ranking metric's value of it."""

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
    parts: Parts,
) -> tuple[list[Pair], list[Sample]]:
    """Pairs and samples of every prompt of `rows`, on the main process; every process answers and ranks its blocks."""
    blocks = []
    for start in parts.own(range(0, len(rows), BLOCK)):
        block = rows.select(range(start, min(len(rows), start + BLOCK)))
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, f"sampled pairs of {split}", start))
            pairs, samples = _block_pairs(model, tokenizer, block, start, split, settings, metric)
        blocks.append((start, {"pairs": [asdict(p) for p in pairs], "samples": [asdict(s) for s in samples]}))
    parts.write(split, blocks)
    parts.wait()
    found = parts.read(split) if parts.is_read_here else []
    return [Pair(**p) for block in found for p in block["pairs"]], [
        Sample(**s) for block in found for s in block["samples"]
    ]


def _block_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block: Dataset,
    start: int,
    split: str,
    settings: SampledPairs,
    metric: Metric,
) -> tuple[list[Pair], list[Sample]]:
    answers = _answers(model, tokenizer, block, settings, metric)
    references = [texts[0] for texts in block["references"]]
    ideal = metric.sample_scores(references, list(block["references"]))
    ids = encode_completions(tokenizer, block["prompt"], references)
    pairs: list[Pair] = []
    samples: list[Sample] = []
    for number, prompt in enumerate(block["prompt"]):
        known = [Text(references[number], ids[number], ideal[number])]
        row = start + number
        pairs += prompt_pairs(settings, prompt, split, row, answers[number], known)
        distinct = {answer.text: answer for answer in answers[number]}.values()
        samples += [Sample(split, row, answer.text, answer.ids, answer.value) for answer in distinct]
    return pairs, samples


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block: Dataset,
    settings: SampledPairs,
    metric: Metric,
) -> list[list[Text]]:
    """`settings.samples` answers to each prompt."""
    decoding = Decoding(
        settings.max_new_tokens,
        settings.temperature,
        top_p=settings.top_p,
        min_new_tokens=settings.min_new_tokens,
        stop_strings=settings.stop_strings,
    )
    prompts = encode_prompts(tokenizer, block["prompt"], model.config.is_encoder_decoder)
    check_prompt_lengths(
        prompts, settings.max_new_tokens, model.config, "reward.pairs.max_new_tokens", "a block of rows"
    )
    copies = [ids for ids in prompts for _ in range(settings.samples)]
    written = generate(model, tokenizer, copies, decoding, settings.batch_size)
    texts = decode(tokenizer, written)
    references = [reference for reference in block["references"] for _ in range(settings.samples)]
    values = metric.sample_scores(texts, references)
    every = [Text(*parts) for parts in zip(texts, written, values, strict=True)]
    return [every[start : start + settings.samples] for start in range(0, len(every), settings.samples)]


def data_pairs(tokenizer: PreTrainedTokenizerBase, split: str, preferences: Sequence) -> list[Pair]:
    """Preference data as pairs, tokenised as the policy's completions are."""
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
