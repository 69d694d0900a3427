"""What a model says of completions, without gradients and without keeping [tokens, vocabulary].

The LM head reads the trunk's states in pieces, as in PPO. Models that PPO does not take, because they change states or
logits in a way that is not known here, give the logits of a whole batch, which are read in pieces from there.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.kernels.lm_head import (
    UNCHANGED,
    Head,
    entropies_and_divergences,
    suppression,
    target_logprobs,
    widened_logits,
)
from pipeline.models.sequences import Sequences, at_first_and_later
from pipeline.models.states import completion_states, head_parts, logits_are_of_head

_READS_TRUNK: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def completion_logprobs(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Compute the log-probability (nats) of each completion token, [B, C], 0 where masked."""
    with _no_copies_kept(model):
        head, states = _head_and_states(model, sequences)
        logprobs = target_logprobs(head, states, sequences.targets, _vocabulary(model))
    return sequences.scatter(logprobs)


@torch.no_grad()
def entropy_and_divergence(
    model: PreTrainedModel,
    sequences: Sequences,
    temperature: float,
    other: PreTrainedModel | None = None,
    suppress_tokens: Iterable[int] = (),
    begin_suppress_tokens: Iterable[int] = (),
) -> tuple[Tensor, Tensor]:
    """Compute the model's entropy and KL(model || other) over the vocabulary at each completion position, in nats.

    `temperature` divides the logits of both, and `suppress_tokens` have probability 0 under both, as have
    `begin_suppress_tokens` as the first token. Each is [B, C], 0 where masked; without another model the KL is 0.
    """
    vocabulary, always, first = _vocabulary(model), list(suppress_tokens), list(begin_suppress_tokens)
    offsets = {later: suppression(vocabulary, [*always, *(() if later else first)]) for later in (True, False)}

    with _no_copies_kept(model):
        own = _head_and_states(model, sequences)
        theirs = None if other is None else _head_and_states(other, sequences)

        def measure(tokens: Tensor | slice, is_first: bool) -> tuple[Tensor, Tensor]:
            chosen = _at(own, tokens, offsets[not is_first]), theirs and _at(theirs, tokens, offsets[not is_first])
            return entropies_and_divergences(*chosen, vocabulary, temperature)

        results = at_first_and_later(sequences.completion_mask, measure) if first else measure(slice(None), False)
    entropies, divergences = (sequences.scatter(values) for values in results)
    return entropies, divergences


@contextmanager
def _no_copies_kept(model: PreTrainedModel) -> Iterator[None]:
    """Keep autocast from holding copies of the weights in its precision, which one pass over many tokens hardly uses.

    Writing completions token by token does, and what it left is let go.
    """
    device = model.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    torch.clear_autocast_cache()
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        yield


def _at(parts: tuple[Head, Tensor], tokens: Tensor | slice, offset: Tensor | None) -> tuple[Head, Tensor]:
    """Choose tokens of what the LM head reads; `offset [V]` is added to its logits."""
    head, states = parts
    if offset is None:
        return head, states[tokens]
    offset = offset.to(states.device)
    return lambda hidden: head(hidden) + offset, states[tokens]


def _head_and_states(model: PreTrainedModel, sequences: Sequences) -> tuple[Head, Tensor]:
    """The LM head, and what it reads for each completion token in row order, [M, H]."""
    reads_trunk = _reads_trunk(model)
    read = completion_states if reads_trunk else _completion_logits
    states = read(model, sequences)[sequences.completion_mask]
    head, scale, transform = head_parts(model) if reads_trunk else (nn.Identity(), 1.0, UNCHANGED)
    return lambda hidden: widened_logits(head(hidden if scale == 1 else hidden * scale), transform), states


def _reads_trunk(model: PreTrainedModel) -> bool:
    """Whether the logits are the LM head on the trunk's states, and the trunk gives these; found out once a model."""
    if model not in _READS_TRUNK:
        try:
            with torch.autocast(model.device.type, enabled=False):
                _READS_TRUNK[model] = logits_are_of_head(model)
        except (AttributeError, TypeError):  # code of the model's own, without the usual outputs
            _READS_TRUNK[model] = False
    return _READS_TRUNK[model]


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _completion_logits(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """[B, C, V]: the model's own logits at each completion position."""
    width = sequences.completion_ids.shape[1]
    if sequences.sound is not None:
        features = sequences.sound.features.index_select(0, sequences.sound.index).to(model.dtype)
        read = torch.cat([sequences.prompt_ids, sequences.completion_ids[:, :-1]], dim=1)
        return model(input_features=features, decoder_input_ids=read, use_cache=False).logits[:, -width:]
    if model.config.is_encoder_decoder:
        ids, mask = sequences.encoder_inputs()
        given = torch.tensor(decoder_prefix(model), device=ids.device).expand(len(ids), -1)
        read = torch.cat([given, sequences.completion_ids[:, :-1]], dim=1)
        output = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=read, use_cache=False)
        return output.logits[:, -width:]
    ids = torch.cat([sequences.prompt_ids, sequences.completion_ids[:, :-1]], dim=1)
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask[:, :-1]], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    return model(**inputs, logits_to_keep=width, use_cache=False).logits[:, -width:]
