"""The decode loop: greedy or sampled completions with a key-value cache whose finished rows leave the batch.

`transformers.generate` copies its whole cache for every token and computes finished rows to the end. Here a cache
grows in blocks, a row that ends gives its place to the last one, and equal prompts are read once. The encoder of an
encoder-decoder runs once for each distinct prompt, and not again for any token.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.sequences import pad_left, pad_right
from pipeline.models.speech import SpokenPrompt, make_sound, reads_sound

BLOCK = 32  # tokens by which a full cache grows

# (logits [N, V] in float32, tokens written so far by all or by each [N], rows of the batch) -> chosen tokens [N]
Choose = Callable[[Tensor, int | Tensor, Tensor], Tensor]
# (rows, tokens written so far [N, t]) -> which rows end here [N]
Stop = Callable[[Tensor, Tensor], Tensor]


def supports_decode_loop(model: PreTrainedModel) -> bool:
    """Whether keys and values are all that layers keep, and a forward pass needs but positions and mask beside them.

    Of a layer with a sliding window all keys and values are kept: the model's own mask hides what is outside of it.
    State-space layers and models that prepare their own inputs are left to transformers' generate.
    """
    if reads_sound(model.config):  # what Whisper prepares is for sound that is longer than its window
        return True
    prepares = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if prepares or not type(model)._supports_default_dynamic_cache():
        return False
    if model.config.is_encoder_decoder:
        needed = {"encoder_hidden_states", "encoder_attention_mask"}
    else:
        needed = {"position_ids", "attention_mask"}
    if not needed <= _forward_arguments(model).keys() or cache_argument(model) is None:
        return False
    if getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None:
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def cache_argument(model: PreTrainedModel) -> str | None:
    """Name the argument in which the model's forward pass takes its key-value cache; None if it takes none.

    It is `cache` from transformers 5.24 on, and `past_key_values` before and in models whose code is older.
    """
    arguments = _forward_arguments(model)
    return next((name for name in ("cache", "past_key_values") if name in arguments), None)


def _forward_arguments(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of the part that reads the tokens: the decoder, or the model below the LM head."""
    reader = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    return inspect.signature(reader.forward).parameters


class PreallocatedCacheLayer(DynamicLayer):
    """A cache layer with spare room: a token is written in place instead of copying everything before it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Start from the states of the prompts, [N, heads, P, D]."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._room = [keys, values]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append one or more positions and return all of them."""
        rows, start = self.keys.shape[0], self.keys.shape[-2]
        end = start + key_states.shape[-2]
        views = []
        for number, (old, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            room = self._room[number]
            if end > room.shape[-2]:
                room = new.new_empty(*old.shape[:-2], end + BLOCK, old.shape[-1])
                room[:, :, :start] = old
                self._room[number] = room
            view = room[:rows, :, :end]
            view[:, :, start:] = new
            views.append(view)
        self.keys, self.values = views
        return self.keys, self.values

    def move_rows(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Put the rows at `sources` where `targets` were and keep the first `rows`."""
        for states in (self.keys, self.values):
            states[targets] = states[sources]
        self.keys, self.values = self.keys[:rows], self.values[:rows]


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    max_new_tokens: int,
    ends: Sequence[int],
    choose: Choose,
    stop: Stop | None = None,
) -> list[list[int]]:
    """One completion for each prompt, up to and including the first token of `ends`, or where `stop` says so."""
    device, total = model.device, len(prompts)
    reader = make_reader(model, prompts, pad_id)
    logits = reader.logits
    ending = torch.tensor(list(ends), device=device)
    written = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.full((total,), max_new_tokens, device=device)
    live = torch.arange(total, device=device)
    for step in range(max_new_tokens):
        chosen = choose(logits.float(), step, live)
        written[live, step] = chosen
        done = torch.isin(chosen, ending)
        if stop is not None:
            done = done | stop(live, written[live, : step + 1])
        if step + 1 == max_new_tokens:
            break
        if done.any():
            lengths[live[done]] = step + 1
            if done.all():
                break
            kept = _compact(done, reader.layers)
            live, chosen = live[kept], chosen[kept]
            reader.keep(kept)
        logits = reader.read(chosen)
    return [row[:length] for row, length in zip(written.tolist(), lengths.tolist(), strict=True)]


def make_reader(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
) -> "CausalReader | DecoderReader":
    """Let the model read the prompts."""
    return (DecoderReader if model.config.is_encoder_decoder else CausalReader)(model, prompts, pad_id)


def _distinct(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[list[Sequence[int]], Tensor]:
    """Each prompt once, and which of them every row has, [N]."""
    numbers: dict[Sequence[int], int] = {}
    keys = (prompt if isinstance(prompt, SpokenPrompt) else tuple(prompt) for prompt in prompts)
    index = [numbers.setdefault(key, len(numbers)) for key in keys]
    return list(numbers), torch.tensor(index, device=device)


def _read_by_encoder(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Let an encoder read different prompts: its states [U, P, H], their mask [U, P] and what the decoder is given."""
    sound = make_sound(prompts, model.device)
    if sound is not None:
        states = sound.encoder_states(model)
        given = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        return states, torch.ones(states.shape[:2], dtype=torch.long, device=model.device), given
    ids, mask = pad_right(prompts, pad_id, model.device)
    mask = mask.long()
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    return states, mask, torch.tensor(decoder_prefix(model), device=model.device).expand(len(ids), -1)


class CausalReader:
    """A causal model that has read the prompts: `logits [N, V]` of the first token, and what reading on takes.

    `growing` are its cache layers, padded to the left of `positions [N]` tokens; `fixed` are none, and there is no
    source.
    """

    source_width = 0

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        distinct, index = _distinct(prompts, model.device)
        ids, mask = pad_left(distinct, pad_id, model.device)
        mask = mask.long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, name = DynamicCache(), cache_argument(model)  # of any length, windows or not
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, name: cache}
        self.model, self.logits = model, model(**inputs, use_cache=True, logits_to_keep=1).logits[index, -1]
        self.layers = [PreallocatedCacheLayer(layer.keys[index], layer.values[index]) for layer in cache.layers]
        self.cache = {name: Cache(layers=self.layers)}
        self.growing, self.fixed = self.layers, []
        self.mask, self.positions, self.width = mask[index], positions[index, -1] + 1, ids.shape[1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, whose cache has been moved already."""
        self.positions, self.mask = self.positions[rows], self.mask[rows]

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] after one more token [n] of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        output = self.model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self.mask,
            position_ids=self.positions.unsqueeze(1),
            use_cache=True,
            **self.cache,
        )
        self.positions = self.positions + 1
        return output.logits[:, -1]


class DecoderReader:
    """The same for an encoder-decoder: the encoder has read the prompts, the decoder what it is given to begin with.

    Every row of a decoder has the same length, so it needs neither positions nor a mask of its own. Its keys and
    values of the prompts, the cache layers `fixed`, are kept once for each row and leave with it.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        distinct, index = _distinct(prompts, model.device)
        states, mask, prefix = _read_by_encoder(model, distinct, pad_id)
        # Not made from the config, which counts the encoder's layers.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model, self.cache = model, {cache_argument(model): cache}
        self.logits = self._forward(prefix, states, mask)[index]
        for side in (cache.self_attention_cache, cache.cross_attention_cache):
            side.layers = [PreallocatedCacheLayer(layer.keys[index], layer.values[index]) for layer in side.layers]
        self.growing, self.fixed = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        self.layers = [*self.growing, *self.fixed]
        # Only their shape is read from now on: what the decoder made of them is in the cache.
        self.states, self.mask = states[:1].expand(len(index), -1, -1), mask[index]
        self.width, self.source_width = prefix.shape[1], states.shape[1]
        self.positions = torch.full((len(index),), self.width, device=model.device)

    def _forward(self, tokens: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=tokens,
            use_cache=True,
            **self.cache,
        )
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, whose cache has been moved already."""
        self.states, self.mask = self.states[: len(rows)], self.mask[rows]

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] after one more token [n] of each row."""
        return self._forward(tokens.unsqueeze(1), self.states, self.mask)


def _compact(done: Tensor, layers: Sequence[PreallocatedCacheLayer]) -> Tensor:
    """Let the finished rows leave: the last rows take the gaps, so little is copied. Returns who stands where, [n]."""
    rows = int((~done).sum())
    gaps, movers = done[:rows].nonzero().squeeze(1), (~done[rows:]).nonzero().squeeze(1) + rows
    order = torch.arange(rows, device=done.device)
    order[gaps] = movers
    for layer in layers:
        layer.move_rows(movers, gaps, rows)
    return order
