"""The prompts of a data set as a model reads them: token ids, or clips of sound with the decoder's given tokens."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.models.speech import CLIP, spoken_prompts
from pipeline.models.text import SOURCE, encode_prompts


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, encoder_decoder: bool = False
) -> list[Sequence[int]]:
    """Make the prompts of rows: of their column `clip` where there is one, else of the column `prompt`."""
    if CLIP in rows.column_names:
        return spoken_prompts(tokenizer, rows[CLIP][:])
    return encode_prompts(tokenizer, rows["prompt"], encoder_decoder)


def encode_prompts_of(
    tokenizer: PreTrainedTokenizerBase, examples: Dataset, encoder_decoder: bool = False
) -> list[Sequence[int]]:
    """Make the prompts of rows as `encode_rows` does, and keep token ids where `datasets` keeps the examples.

    A later stage or another process finds them there; examples that are only in memory are tokenised each time.
    """

    def encode(batch: dict[str, list], source: str) -> dict[str, list]:
        return {"prompt_ids": encode_prompts(tokenizer, batch["prompt"], encoder_decoder)}

    if CLIP in examples.column_names:
        return encode_rows(tokenizer, examples)
    prompts = examples.select_columns("prompt")
    options = {"remove_columns": "prompt", "fn_kwargs": {"source": SOURCE}, "desc": "Tokenizing prompts"}
    try:
        if prompts.cache_files:
            return prompts.map(encode, batched=True, **options)["prompt_ids"][:]
    except OSError:  # a folder that cannot be written, or a full disk
        pass
    return encode_prompts(tokenizer, prompts["prompt"], encoder_decoder)
