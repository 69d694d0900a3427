"""Write completions: sampling for rollouts, greedy or beam search for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.sequences import length_sorted_chunks, pad_left


@dataclass(frozen=True)
class Decoding:
    """How to write a completion of at most `max_new_tokens` tokens. `temperature` None: greedy, or beam search.

    No EOS is written before `min_new_tokens`; a completion ends behind the first of `stop_strings` its text contains.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()


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

    A completion ends with an EOS token if the model wrote one, behind a stop string, or at `max_new_tokens`. The
    model's saved generation settings (penalties, forced tokens, sampling) are not used: a recipe alone decides.
    """
    ends = eos_token_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature is not None,
        temperature=decoding.temperature,
        top_k=decoding.top_k if decoding.temperature is not None else None,
        top_p=decoding.top_p if decoding.temperature is not None else None,
        num_beams=decoding.num_beams,
        min_new_tokens=decoding.min_new_tokens or None,
        stop_strings=list(decoding.stop_strings) or None,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # transformers fills unset fields from the model's own generation config, so ours takes its place meanwhile.
    saved, model.generation_config = model.generation_config, config
    try:
        return _generate_in_chunks(model, tokenizer, prompts, config, batch_size)
    finally:
        model.generation_config = saved


def finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Sequence[int]],
    stop_strings: Sequence[str] = (),
) -> list[bool]:
    """Whether each completion ended by itself, with EOS or a stop string, rather than at the token limit."""
    ends = eos_token_ids(model, tokenizer)
    return [ids[-1] in ends or _contains(tokenizer, ids, stop_strings) for ids in completions]


def _contains(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_strings: Sequence[str]) -> bool:
    if not stop_strings:
        return False
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return any(stop in text for stop in stop_strings)


def _generate_in_chunks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    batch_size: int,
) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompts]
    for chunk in length_sorted_chunks(torch.tensor([len(p) for p in prompts]), batch_size):
        rows = chunk.tolist()
        ids, mask = pad_left([prompts[row] for row in rows], config.pad_token_id, model.device)
        output = model.generate(
            input_ids=ids, attention_mask=mask.long(), generation_config=config, tokenizer=tokenizer
        )
        for row, tokens in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            completions[row] = _cut(tokenizer, tokens, config)
    return completions


def _cut(tokenizer: PreTrainedTokenizerBase, tokens: list[int], config: GenerationConfig) -> list[int]:
    """The tokens up to the first EOS or the token that completes a stop string; what follows is padding."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in config.eos_token_id), len(tokens))
    stops = config.stop_strings or ()
    if _contains(tokenizer, tokens[:length], stops):
        length = next(n for n in range(1, length + 1) if _contains(tokenizer, tokens[:n], stops))
    return tokens[:length]
