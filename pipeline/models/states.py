"""What a model has read before each completion token: here alone causal models and encoder-decoders differ.

State t has read the prompt and t completion tokens. Token t's log-probability and value come from state t; a reward
head reads the state after the last token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.dropout import without_dropout
from pipeline.models.kernels.lm_head import LogitTransform
from pipeline.models.kernels.packing import IMPLEMENTATIONS, PREFIX
from pipeline.models.loading import position_limit
from pipeline.models.sequences import Sequences, probe_sequences
from pipeline.models.speech import probe_sound, reads_sound

# The largest |log pi - log rho| of a token that rounding explains: DoRA and checkpointing compute in another order.
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
# Models that scale the decoder's output by d_model ** -0.5 before their LM head where this key of their config is set.
SCALED_WHERE = {
    "t5": "scale_decoder_outputs",
    "longt5": "scale_decoder_outputs",
    "umt5": "tie_word_embeddings",
    "switch_transformers": "tie_word_embeddings",
}
# The key of their config by which models multiply or divide the logits of their LM head.
MULTIPLIED_BY = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "hyperclovax": "logits_scaling",
}
DIVIDED_BY = {
    "granite": "logits_scaling",
    "granite_swa": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoe_swa": "logits_scaling",
    "granitemoeshared": "logits_scaling",
}


def completion_states(model: PreTrainedModel, sequences: Sequences, last: bool = False) -> Tensor:
    """[B, C, H]: the trunk's state before each completion token; with `last` [B, C + 1, H], the one after it too."""
    ids, mask = sequences.completion_ids, sequences.completion_mask
    if not last:
        ids, mask = ids[:, :-1], mask[:, :-1]
    if model.config.is_encoder_decoder:
        return _decoder_states(model, sequences, ids)
    read = torch.cat([sequences.prompt_ids, ids], dim=1)
    mask = torch.cat([sequences.prompt_mask, mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model.base_model(input_ids=read, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    return output.last_hidden_state[:, sequences.prompt_ids.shape[1] - 1 :]


def final_states(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """[B, H]: the state that has read the prompt and every completion token, an EOS at its end included."""
    states, ends = completion_states(model, sequences, last=True), sequences.completion_mask.sum(1)
    return states[torch.arange(len(ends), device=ends.device), ends]


def _decoder_states(model: PreTrainedModel, sequences: Sequences, ids: Tensor) -> Tensor:
    """What the decoder has read of `ids [B, C]`, from the last token it is given on: [B, C + 1, H]."""
    if sequences.sound is not None:
        return _states_after_sound(model, sequences, ids)
    prefix = torch.tensor(decoder_prefix(model), device=ids.device)
    encoded = sequences.encoder_states
    output = model.get_decoder()(
        input_ids=torch.cat([prefix.expand(len(ids), -1), ids], dim=1),
        encoder_hidden_states=encode(model, sequences) if encoded is None else encoded,
        encoder_attention_mask=sequences.encoder_inputs()[1].long(),
        use_cache=False,
    )
    return output.last_hidden_state[:, len(prefix) - 1 :]


def _states_after_sound(model: PreTrainedModel, sequences: Sequences, ids: Tensor) -> Tensor:
    """What the decoder of a speech model has read, from the last given token on: [B, C + 1, H].

    Every row is given as many tokens, and every clip fills the model's window, so there is nothing to mask.
    """
    output = model.get_decoder()(
        input_ids=torch.cat([sequences.prompt_ids, ids], dim=1),
        encoder_hidden_states=sequences.sound.encoder_states(model),
        use_cache=False,
    )
    return output.last_hidden_state[:, sequences.prompt_ids.shape[1] - 1 :]


def with_encoder_states(model: PreTrainedModel, sequences: Sequences, size: int) -> Sequences:
    """Keep what the encoder makes of the prompts with them, `size` prompts at a time."""
    if sequences.sound is not None:
        return replace(sequences, sound=sequences.sound.encoded(model, size))
    return replace(sequences, encoder_states=encode(model, sequences, size))


def encode(model: PreTrainedModel, sequences: Sequences, size: int | None = None) -> Tensor:
    """The encoder's states [B, P, H] of the prompts, padded on the right; equal prompts are read once.

    `size` is how many are read at a time; None: all.
    """
    ids, mask = sequences.encoder_inputs()
    distinct, index = ids.masked_fill(~mask, -1).unique(dim=0, return_inverse=True)
    encoder = model.get_encoder()
    states = [
        encoder(input_ids=prompts.clamp(min=0), attention_mask=(prompts >= 0).long()).last_hidden_state
        for prompts in distinct.split(size or len(distinct))
    ]
    # Not by indexing, whose gradient adds up in any order where there are several threads.
    return torch.cat(states).index_select(0, index)


def head_parts(model: PreTrainedModel) -> tuple[nn.Module, float, LogitTransform]:
    """The LM head, what states are multiplied by before it, and what is done to its logits."""
    head, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True).to_dict()
    multiplier = config.get(MULTIPLIED_BY.get(model.config.model_type, ""), 1.0)
    divisor = config.get(DIVIDED_BY.get(model.config.model_type, ""), 1.0)
    cap = config.get("final_logit_softcapping")
    if not model.config.is_encoder_decoder:
        return head, 1.0, LogitTransform(None, multiplier / divisor, cap)
    flag = SCALED_WHERE.get(model.config.model_type)
    scale = model.config.d_model**-0.5 if flag and getattr(model.config, flag) else 1.0
    bias = dict(model.named_buffers(recurse=False)).get("final_logits_bias")
    return head, scale, LogitTransform(None if bias is None else bias[0], cap=cap)


def lm_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """States [N, H] of the trunk -> logits [N, V], with what some models do before and after their head."""
    head, scale, transform = head_parts(model)

    def logits(states: Tensor) -> Tensor:
        return transform(head(states if scale == 1 else states * scale))

    return logits


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend by sdpa or eager until the block ends: other kernels may need a GPU, or half precision."""
    written = model.config._attn_implementation
    if written is None or written.removeprefix(PREFIX) in IMPLEMENTATIONS or not model._can_set_attn_implementation():
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(written)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose logits depend on tokens after them (BERT and its kind): no text could be generated by it.

    Raises:
        ValueError: naming the model type.
    """
    ids, training = torch.arange(1, 7, device=model.device).unsqueeze(0), model.training
    model.eval()  # dropout would make any two passes differ
    inputs = _encoder_arguments(model, ids) if model.config.is_encoder_decoder else {}
    name = "decoder_input_ids" if inputs else "input_ids"
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)  # another last token
    with _plain_attention(model):
        first, second = (model(**inputs, **{name: row}, use_cache=False).logits.float() for row in (ids, other))
    model.train(training)
    *before, after_itself = (first - second).abs().amax(-1)[0]
    share = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.03  # of what the token changes after itself
    if torch.stack(before).max() > share * after_itself:
        raise ValueError(
            f"model: {model.config.model_type!r} reads the whole text in both directions, so that it cannot write one "
            "token after the other; give a causal or an encoder-decoder language model"
        )


def _encoder_arguments(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return what an encoder may read: tokens, or a clip of noise for each of their rows."""
    if reads_sound(model.config):
        return {"input_features": probe_sound(model, len(ids)).features}
    return {"input_ids": ids}


@torch.no_grad()
def check_repeatable(model: PreTrainedModel) -> None:
    """Refuse a model that computes something else each time it trains, though its dropout is off.

    Raises:
        ValueError: two passes over the same tokens differ, by the noise of a router, naming the model type.
    """
    vocabulary, training = model.get_input_embeddings().weight.shape[0], model.training
    sequences = with_probe_sound(model, probe_sequences(vocabulary, position_limit(model.config), model.device))
    random_state = torch.get_rng_state()
    model.train()
    with without_dropout(model), _plain_attention(model):
        first, second = (lm_head(model)(completion_states(model, sequences)).log_softmax(-1) for _ in range(2))
    model.train(training)
    torch.set_rng_state(random_state)
    difference = float((first - second).abs().max())
    if difference > ROUNDING[model.dtype]:
        raise ValueError(
            f"model: two passes of {model.config.model_type!r} over the same text differ by up to {difference:.2g} "
            "nats a token in training, so the first ratio of PPO would not be 1; likely the noise of a router: set it "
            "to 0 in the model's configuration"
        )


@torch.no_grad()
def logits_are_of_head(model: PreTrainedModel) -> bool:
    """Whether `lm_head` on the trunk's states gives the model's logits."""
    ids, training = torch.arange(1, 5, device=model.device).unsqueeze(0), model.training
    model.eval()  # dropout would make any two passes differ
    row = Sequences(ids, torch.ones_like(ids, dtype=torch.bool), ids, torch.ones_like(ids, dtype=torch.bool))
    row = with_probe_sound(model, row)
    if model.config.is_encoder_decoder:
        start = torch.tensor([decoder_prefix(model)], device=model.device) if row.sound is None else row.prompt_ids
        inputs = {**_encoder_arguments(model, ids), "decoder_input_ids": torch.cat([start, ids[:, :-1]], dim=1)}
    else:
        inputs = {"input_ids": torch.cat([ids, ids[:, :-1]], dim=1)}
    with _plain_attention(model):
        expected = model(**inputs, use_cache=False).logits[:, -ids.shape[1] :]
        computed = lm_head(model)(completion_states(model, row))
    model.train(training)
    # Products of another size may add up in another order: a few steps of what half a precision can tell apart.
    rounding = max(1e-3, 4 * torch.finfo(computed.dtype).eps)
    return torch.allclose(computed.float(), expected.float(), rtol=rounding, atol=rounding)


def with_probe_sound(model: PreTrainedModel, sequences: Sequences) -> Sequences:
    """Give probes to a speech model a clip of noise each, and one given token; return those of others as they are."""
    if not reads_sound(model.config):
        return sequences
    ids, mask = sequences.prompt_ids[:, -1:], sequences.prompt_mask[:, -1:]
    return replace(sequences, prompt_ids=ids, prompt_mask=mask, sound=probe_sound(model, len(ids)))


def check_trunk_and_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than its LM head on its trunk, which is how PPO computes them.

    Raises:
        ValueError: the logits differ (a model that changes them in a way that is not known here), naming its type.
    """
    if not logits_are_of_head(model):
        raise ValueError(
            f"model: {model.config.model_type!r} changes its states before or its logits after the LM head in a way "
            "that PPO here does not reproduce; choose another model"
        )
