"""How many tokens a completion needs, from the references of the data."""

import math
from collections.abc import Sequence

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models.loading import position_limit
from pipeline.models.prompt_lengths import decoder_room
from pipeline.models.text import encode_completions

SHARE = 0.99  # of the references that fit
MULTIPLE = 8
MAX_ROWS = 2000  # whose references are tokenised; they are spread over the data


def reference_length(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rows: Dataset, key: str) -> int:
    """Return how many tokens hold `SHARE` of the references of `rows`, EOS included: a multiple of `MULTIPLE`.

    It is at most half of what a causal model can read, so that prompts have the other half. The column `completion`,
    whose thoughts and tool calls the references may lack, counts as one more reference.
    `key` is the recipe's name of the number.

    Raises:
        ValueError: the rows have neither references nor completions.
    """
    spread = rows.select(range(0, len(rows), max(1, math.ceil(len(rows) / MAX_ROWS))))
    pairs = [(example["prompt"], answer) for example in spread for answer in _answers(example)]
    if not pairs:
        raise ValueError(f"{key}: missing: the data has no references to take it from; set it, such as {key}: 256")
    length = covering_length([len(ids) for ids in encode_completions(tokenizer, *zip(*pairs, strict=True))])
    limit = position_limit(config)
    if limit is None:
        return length
    return min(length, decoder_room(config) if config.is_encoder_decoder else limit // 2)


def covering_length(lengths: Sequence[int]) -> int:
    """Return the least multiple of `MULTIPLE` that is not below `SHARE` of the lengths."""
    longest = sorted(lengths)[math.ceil(SHARE * len(lengths)) - 1]
    return math.ceil(longest / MULTIPLE) * MULTIPLE


def _answers(example: dict) -> list:
    answers = list(example.get("references") or ())
    completion = example.get("completion")
    return answers if completion in (None, "", *answers) else [*answers, completion]
