"""Write completions: sampling for rollouts, greedy or beam search for evaluation."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.kernels.decode_loop import Stop, decode_batch, supports_decode_loop
from pipeline.models.kernels.narrow_weights import narrow_weights
from pipeline.models.kernels.static_decode import (
    decode_static,
    supports_refill,
    supports_static_decode,
    within_window,
)
from pipeline.models.sampling import Decoding, TokenChooser
from pipeline.models.sequences import length_sorted_chunks, pad_left, pad_right
from pipeline.models.sharding import is_sharded
from pipeline.models.speech import forbidden_tokens, make_sound, reads_sound
from pipeline.models.stop_strings import StopStrings
from pipeline.runtime.seeds import derive_seed

# Gets after every token what each unfinished row has written, as lists of token ids.
Watch = Callable[[list[list[int]]], None]
# Where decoding with static shapes is faster: it saves launches, and computes finished rows and unread columns.
STATIC_DEVICES = {"cuda"}
# Batches of prompts that wait together where finished rows are refilled: tables of all their tokens are on the device.
WAITING_BATCHES = 32


@dataclass(frozen=True)
class Completions:
    """Completions of a batch of prompts: token `ids`, the same as `texts`, and which `finished [B]` by themselves."""

    ids: list[list[int]]
    texts: list[str]
    finished: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.ids]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those of the model's generation config, and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Write one completion for each prompt.

    A completion ends with an EOS token if the model wrote one, or with the token that completes a stop string, else it
    has `max_new_tokens` tokens. Of the model's saved generation settings only EOS tokens and what a decoder begins
    with are used (no penalties, no sampling), so that a recipe alone decides. A sampled token is a function of one
    uniform number of its own row and step, drawn from torch's generator for all prompts at once, so neither
    `batch_size` nor other rows change a completion.

    Args:
        model: Causal or encoder-decoder, in evaluation mode.
        tokenizer: Gives EOS and padding, and the texts in which stop strings are looked for.
        prompts: Token ids, as lists of any length.
        decoding: Sampling, greedy or beam search, and where a completion ends.
        batch_size: Texts that are written at once.
        watch: Gets what is written while it is written.

    Returns:
        Token ids of the completions, as lists in the order of the prompts.

    Raises:
        FloatingPointError: the model's probabilities are not finite.
    """
    ends, decoding = eos_token_ids(model, tokenizer), decoding.with_forbidden(forbidden_tokens(model))
    write = _generate_by_transformers
    if decoding.num_beams == 1:
        if supports_decode_loop(model):
            write = _generate_by_loop
        else:
            warn_of_slow_generation(model.config.model_type)
    with nullcontext() if is_sharded(model) else narrow_weights(model):  # which are whole, where slices are not
        return write(model, tokenizer, prompts, decoding, ends, batch_size, watch)


def _generate_by_loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: list[int],
    batch_size: int,
    watch: Watch | None,
) -> list[list[int]]:
    draws = torch.rand(len(prompts), decoding.max_new_tokens) if decoding.temperature is not None else None
    # A watcher is to see each token at once, and no row that has ended.
    static = watch is None and _is_static(model) and within_window(model, prompts, decoding.max_new_tokens)
    decode = partial(decode_static, at_once=batch_size) if static else decode_batch
    chunk_size = batch_size * WAITING_BATCHES if static and refills_rows(model) else batch_size
    completions: list[list[int]] = [[] for _ in prompts]
    for chunk in length_sorted_chunks(torch.tensor([len(p) for p in prompts]), chunk_size):
        rows = chunk.tolist()
        chosen = [prompts[row] for row in rows]
        has_prefix = model.config.is_encoder_decoder and not reads_sound(model.config)
        read = [decoder_prefix(model)] * len(rows) if has_prefix else chosen
        choose = TokenChooser(decoding, ends, read, None if draws is None else draws[chunk].to(model.device))
        stop = _stopper(tokenizer, decoding, watch)
        written = decode(model, chosen, tokenizer.pad_token_id, decoding.max_new_tokens, ends, choose, stop)
        choose.check()
        for row, tokens in zip(rows, written, strict=True):
            completions[row] = tokens
    return completions


def refills_rows(model: PreTrainedModel) -> bool:
    """Whether `generate` lets waiting prompts take the rows of finished texts: then it is best given many at once."""
    return _is_static(model) and supports_refill(model)


def _is_static(model: PreTrainedModel) -> bool:
    # The weights of a sharded model move in memory.
    return model.device.type in STATIC_DEVICES and supports_static_decode(model) and not is_sharded(model)


@cache  # once for each type of model
def warn_of_slow_generation(model_type: str) -> None:
    """Say on the main process that transformers' `generate` writes the completions instead of the decode loop."""
    if PartialState().is_main_process:
        text = (
            f"warning: {model_type}: transformers' generate writes the completions, because the decode loop does not "
            "know this model's cache or positions: slower, and samples depend on the batch size and the processes"
        )
        tqdm.write(text, file=sys.stderr)  # above a progress bar, where there is one


def seed_samples(model: PreTrainedModel, decoding: Decoding, seed: int, rank: int, count: int) -> None:
    """Seed torch for what `generate` draws for `count` prompts of process `rank`.

    The decode loop draws its numbers for all prompts at once, and numbers drawn together or one after the other are
    the same: every process uses one seed and skips what the processes before it draw, so that several sample what one
    would. Where transformers' `generate` draws, batch by batch, every process has a seed of its own instead.
    """
    if not supports_decode_loop(model):
        torch.manual_seed(derive_seed(seed, "samples", rank))
        return
    torch.manual_seed(derive_seed(seed, "samples", 0))
    torch.rand(rank * count, decoding.max_new_tokens)


def finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[bool]:
    """Whether each completion ended by itself, with EOS or a stop string, rather than at the token limit."""
    ends = eos_token_ids(model, tokenizer)
    stops = StopStrings(tokenizer, decoding)
    return [ids[-1] in ends or stops.in_text(ids) for ids in completions]


def _stopper(tokenizer: PreTrainedTokenizerBase, decoding: Decoding, watch: Watch | None) -> Stop | None:
    """Which texts hold one of the stop strings, after at least `min_new_tokens`; None if there are none to `watch`."""
    if not decoding.stop_strings and watch is None:
        return None
    stops = StopStrings(tokenizer, decoding)

    def stop(rows: Tensor, written: Tensor) -> Tensor:
        texts = written.tolist()
        if watch is not None:
            watch(texts)
        return torch.tensor([stops.in_new_text(ids) for ids in texts], device=written.device)

    return stop


@torch.no_grad()
def _generate_by_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: list[int],
    batch_size: int,
    watch: Watch | None,
) -> list[list[int]]:
    sampled, stops = decoding.temperature is not None, StopStrings(tokenizer, decoding)
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        do_sample=sampled,
        temperature=decoding.temperature,
        top_k=decoding.top_k if sampled else None,
        top_p=decoding.top_p if sampled else None,
        min_p=decoding.min_p if sampled and decoding.min_p else None,
        repetition_penalty=decoding.repetition_penalty if sampled else None,
        suppress_tokens=list(decoding.suppress_tokens) or None,
        begin_suppress_tokens=list(decoding.begin_suppress_tokens) or None,
        num_beams=decoding.num_beams,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=next(iter(decoder_prefix(model)), None),
    )
    # transformers fills unset fields from the model's own generation config, so ours takes its place meanwhile.
    saved, model.generation_config = model.generation_config, config
    completions: list[list[int]] = [[] for _ in prompts]
    try:
        for chunk in length_sorted_chunks(torch.tensor([len(p) for p in prompts]), batch_size):
            rows = chunk.tolist()
            inputs, start = _generation_inputs(model, [prompts[row] for row in rows], config.pad_token_id)
            criteria = None if watch is None else StoppingCriteriaList([_watcher(watch, start)])
            # Of a sharded model too every process writes as much as it has to: `Sharding.gathered`.
            given = {"generation_config": config, "stopping_criteria": criteria, "synced_gpus": False}
            if reads_sound(model.config):  # Whisper's own cuts long sound into windows and rates what it has written
                output = GenerationMixin.generate(model, **inputs, **given)
            else:
                output = model.generate(**inputs, **given)
            for row, tokens in zip(rows, output[:, start:].tolist(), strict=True):
                lengths = range(1, len(tokens))
                stop = (n for n in lengths if tokens[n - 1] in ends or stops.in_new_text(tokens[:n]))
                completions[row] = tokens[: next(stop, len(tokens))]
    finally:
        model.generation_config = saved
    return completions


def _generation_inputs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[dict[str, Tensor], int]:
    """Return the arguments of transformers' `generate`, and where a completion starts in what it returns."""
    sound = make_sound(prompts, model.device)
    if sound is not None:
        features = sound.features.index_select(0, sound.index).to(model.dtype)
        given = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        return {"input_features": features, "decoder_input_ids": given}, given.shape[1]
    prefix = decoder_prefix(model)
    pad = pad_right if prefix else pad_left
    ids, mask = pad(prompts, pad_id, model.device)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if prefix:
        inputs["decoder_input_ids"] = torch.tensor([prefix] * len(prompts), device=model.device)
    return inputs, len(prefix) or ids.shape[1]


def _watcher(watch: Watch, start: int) -> Callable[..., Tensor]:
    """Make a stopping criterion of transformers that stops nothing and shows `watch` the tokens from `start` on."""

    def look(ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        watch(ids[:, start:].tolist())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return look
