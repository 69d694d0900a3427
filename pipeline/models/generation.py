"""Write completions: sampling for rollouts, greedy or beam search for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.sequences import length_sorted_chunks, pad_left


@dataclass(frozen=True)
class Decoding:
    """How to write a completion of at most `max_new_tokens` tokens. `temperature` None: greedy, or beam search."""

    max_new_tokens: int
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those of the model's generation config, and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
) -> list[list[int]]:
    """Token ids of one completion for each prompt (lists of ids), in the order of the prompts.

    A completion ends with an EOS token if the model wrote one, else it has `max_new_tokens` tokens. The model's saved
    generation settings (penalties, forced tokens, sampling) are not used, so that a recipe alone decides.
    """
    ends = eos_token_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature is not None,
        temperature=decoding.temperature,
        top_k=decoding.top_k if decoding.temperature is not None else None,
        top_p=decoding.top_p if decoding.temperature is not None else None,
        num_beams=decoding.num_beams,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # transformers fills unset fields from the model's own generation config, so ours takes its place meanwhile.
    saved, model.generation_config = model.generation_config, config
    try:
        return _generate_in_chunks(model, prompts, config, batch_size)
    finally:
        model.generation_config = saved


def _generate_in_chunks(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, batch_size: int
) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompts]
    for chunk in length_sorted_chunks(torch.tensor([len(p) for p in prompts]), batch_size):
        rows = chunk.tolist()
        ids, mask = pad_left([prompts[row] for row in rows], config.pad_token_id, model.device)
        output = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
        for row, tokens in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            completions[row] = _cut_after_eos(tokens, config.eos_token_id)
    return completions


def _cut_after_eos(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
