"""The decode loop: greedy or sampled completions with a key-value cache whose finished rows leave the batch.

`transformers.generate` copies its whole cache for every token and computes finished rows to the end. Here a cache
grows in blocks, a row that ends gives its place to the last one, and equal prompts are read once.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.models.sequences import pad_left

BLOCK = 32  # tokens by which a full cache grows

# (logits [N, V] in float32, tokens written so far, rows of the batch they belong to) -> chosen tokens [N]
Choose = Callable[[Tensor, int, Tensor], Tensor]
# (rows, tokens written so far [N, t]) -> which rows end here [N]
Stop = Callable[[Tensor, Tensor], Tensor]


def supports_decode_loop(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values, and positions and mask are all a forward pass needs beside them.

    Sliding windows, state-space layers and models that prepare their own inputs are left to transformers' generate.
    """
    prepares = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if prepares or model.config.is_encoder_decoder or not type(model)._supports_default_dynamic_cache():
        return False
    parameters = inspect.signature(model.base_model.forward).parameters
    if not {"position_ids", "past_key_values", "attention_mask"} <= parameters.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class RoomyLayer(DynamicLayer):
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
    logits, cache, mask, positions = _read_prompts(model, prompts, pad_id)
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
            kept = _close_ranks(done, cache)
            live, chosen, positions, mask = live[kept], chosen[kept], positions[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        output = model(
            input_ids=chosen.unsqueeze(1),
            attention_mask=mask,
            position_ids=positions.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        )
        logits, positions = output.logits[:, -1], positions + 1
    return [row[:length] for row, length in zip(written.tolist(), lengths.tolist(), strict=True)]


def _read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Cache, Tensor, Tensor]:
    """Logits of the first token [N, V], cache, mask [N, P] and next positions [N]; equal prompts are read once."""
    numbers: dict[tuple[int, ...], int] = {}
    index = torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts], device=model.device)
    ids, mask = pad_left(list(numbers), pad_id, model.device)
    mask = mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        logits_to_keep=1,
    )
    layers = [RoomyLayer(layer.keys[index], layer.values[index]) for layer in read.past_key_values.layers]
    return read.logits[index, -1], Cache(layers=layers), mask[index], positions[index, -1] + 1


def _close_ranks(done: Tensor, cache: Cache) -> Tensor:
    """Let the finished rows leave: the last rows take the gaps, so little is copied. Returns who stands where, [n]."""
    rows = int((~done).sum())
    gaps, movers = done[:rows].nonzero().squeeze(1), (~done[rows:]).nonzero().squeeze(1) + rows
    order = torch.arange(rows, device=done.device)
    order[gaps] = movers
    for layer in cache.layers:
        layer.move_rows(movers, gaps, rows)
    return order
