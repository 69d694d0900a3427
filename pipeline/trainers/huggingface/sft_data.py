"""Examples for SFT: texts to token ids and labels, cut to the length that the model reads."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.models.speech import CLIP, spoken_prompts
from pipeline.models.text import SOURCE, encode_completions, encode_prompts

RowPlaces = Callable[[str, Sequence[int]], str]  # a split's name and row numbers -> where these rows are in the data


def row_numbers(split: str, rows: Sequence[int]) -> str:
    """Name the first of the rows by its number."""
    return f"row {rows[0]}"


def sft_dataset(
    tokenizer: PreTrainedTokenizerBase,
    split: Dataset,
    completion_only_loss: bool = True,
    encoder_decoder: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise each example into `input_ids`, `labels` (-100 where no loss is taken) and `length`.

    Prompts are rendered as PPO renders them. For an encoder-decoder the `input_ids` are the prompt and the `labels`
    the completion; for a speech model the `input_ids` are what its decoder is given, and the column `clip` stays.
    """

    def encode(batch: dict[str, list], source: str) -> dict[str, list]:
        if CLIP in batch:
            prompts = [list(prompt) for prompt in spoken_prompts(tokenizer, batch[CLIP])]
        else:
            prompts = encode_prompts(tokenizer, batch["prompt"], encoder_decoder)
        completions = encode_completions(tokenizer, batch["prompt"], batch["completion"])
        pairs = list(zip(prompts, completions, strict=True))
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        if encoder_decoder:
            return {"input_ids": prompts, "labels": completions, "length": lengths}
        return {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "labels": [([-100] * len(p) if completion_only_loss else p) + c for p, c in pairs],
            "length": lengths,
        }

    # Where there are files the other processes read its cache; rows in memory have none.
    with PartialState().local_main_process_first() if split.cache_files else nullcontext():
        return split.map(
            encode,
            batched=True,
            fn_kwargs={"source": SOURCE},
            remove_columns=[name for name in split.column_names if name != CLIP],
            num_proc=num_proc,
            desc="Tokenizing",
        )


def truncate_examples(
    examples: Dataset,
    max_length: int | None,
    split: str,
    num_proc: int | None = None,
    where: RowPlaces = row_numbers,
) -> Dataset:
    """Truncate `input_ids` and `labels` to `max_length`; drop examples whose prompt alone fills it.

    How many are truncated or dropped is printed on the main process, and `where` says where the first of them is.

    Raises:
        ValueError: no example is left.
    """
    if max_length is None:
        return examples
    dropped, cut = [], []
    for row, (ids, labels) in enumerate(zip(examples["input_ids"], examples["labels"], strict=True)):
        if all(label == -100 for label in labels[:max_length]):
            dropped.append(row)
        elif max(len(ids), len(labels)) > max_length:
            cut.append(row)
    rule = f"sft.max_length ({max_length} tokens)"
    if len(dropped) == len(examples):
        raise ValueError(
            f"sft.max_length: each of the {len(examples)} prompts of {split} fills {rule}; raise it, or cut them"
        )
    if (dropped or cut) and PartialState().is_main_process:
        words = [f"{len(cut)} are cut to {rule}: the first is {where(split, cut[:1])}"] if cut else []
        if dropped:
            first = where(split, dropped[:1])
            words.append(f"{len(dropped)} are left out, because their prompts fill {rule}: the first is {first}")
        print(f"sft: of {len(examples)} examples of {split} {', and '.join(words)}", file=sys.stderr)
    if dropped:
        drop = set(dropped)
        examples = examples.select([row for row in range(len(examples)) if row not in drop])
    if not cut:
        return examples

    def truncate(example: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: example[name][:max_length] for name in ("input_ids", "labels")}

    return examples.map(truncate, num_proc=num_proc, desc="Truncating")
