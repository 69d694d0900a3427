"""Decode with static shapes: one more token of every row is one replay of a CUDA graph.

The decode loop launches thousands of small kernels for each token, and a GPU waits for Python. Here all that the pass
for one token reads and writes lies at fixed addresses: it is captured once for each bucket of rows and replayed from
then on. Rows are aligned to the left, so that a row's next position is also its column in the cache. Finished rows are
computed on until the others fit a smaller bucket. A pass that cannot be captured is computed at the same addresses.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from pipeline.models.kernels.decode_loop import (
    CausalReader,
    Choose,
    DecoderReader,
    Stop,
    make_reader,
    supports_decode_loop,
)
from pipeline.models.kernels.narrow_adapters import narrow_adapters
from pipeline.models.kernels.packing import IMPLEMENTATIONS, PREFIX
from pipeline.models.kernels.static_step import StepMemory, can_capture, captured_state
from pipeline.models.speech import reads_sound

COLUMNS = 128  # a cache has a multiple of so many columns
LOOK = 8  # tokens after which the ends are looked at: each look waits for the device

# What may be kept from one batch to the next, as a share of the device's memory: the update needs the rest.
KEPT_SHARE = 1 / 16
# Kept because a capture takes as long as many replays. They refer to no model.
_MEMORIES: WeakKeyDictionary[PreTrainedModel, StepMemory] = WeakKeyDictionary()


def supports_static_decode(model: PreTrainedModel) -> bool:
    """Whether the decode loop knows the model, transformers gives it static caches, and its attention takes a mask.

    Models with sliding windows are unknown to the decode loop already, and are left to transformers' generate. Those
    that hear sound take no mask for what the encoder has read.
    """
    if reads_sound(model.config):
        return False
    attention = model.config._attn_implementation.removeprefix(PREFIX)
    return attention in IMPLEMENTATIONS and model._can_compile_fullgraph and supports_decode_loop(model)


@torch.no_grad()
def decode_static(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    max_new_tokens: int,
    ends: Sequence[int],
    choose: Choose,
    stop: Stop | None = None,
) -> list[list[int]]:
    """Write what `decode_batch` writes: one completion for each prompt, up to the first of `ends` or a stop."""
    written = None
    try:
        with narrow_adapters(model):
            written = _decode(model, prompts, pad_id, max_new_tokens, ends, choose, stop)
    finally:  # where memory ran out, smaller batches need what is kept here
        if written is None or not _is_small(_MEMORIES.get(model)):
            _MEMORIES.pop(model, None)
    return written


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    max_new_tokens: int,
    ends: Sequence[int],
    choose: Choose,
    stop: Stop | None,
) -> list[list[int]]:
    reader = make_reader(model, prompts, pad_id)
    logits, total, device = reader.logits, len(prompts), model.device
    rows, length, source = bucket(total), _columns(reader.width + max_new_tokens), _columns(reader.source_width)
    memory = None
    live = torch.arange(total, device=device)
    written = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.full((total,), max_new_tokens, device=device)
    ending, seen = torch.tensor(list(ends), device=device), 0
    for step in range(max_new_tokens):
        chosen = choose(logits.float(), step, live)
        written[live, step] = chosen
        ended = (chosen.unsqueeze(1) == ending).any(1)
        lengths[live] = torch.where(ended, lengths[live].clamp(max=step + 1), lengths[live])
        looks = (step + 1) % LOOK == 0 or step + 1 == max_new_tokens
        if looks and stop is not None:
            for column in range(seen, step + 1):
                stopped = stop(live, written[live, : column + 1])
                lengths[live] = torch.where(stopped, lengths[live].clamp(max=column + 1), lengths[live])
            seen = step + 1
        if step + 1 == max_new_tokens:
            break
        if memory is None:
            memory, reader = _memory(model, reader, rows, length, source), None
        if looks:
            order = open_first((lengths[live] <= step + 1).tolist())
            if not order:
                break
            if bucket(len(order)) < rows:
                rows, kept = bucket(len(order)), torch.tensor(order, device=device)
                memory.move_rows(order)
                live, chosen = live[kept], chosen[kept]
        memory.tokens[: len(live)] = chosen
        logits = memory.step(model, rows, length, source)[: len(live)]
    return [row[:count] for row, count in zip(written.tolist(), lengths.tolist(), strict=True)]


def _memory(
    model: PreTrainedModel, reader: CausalReader | DecoderReader, rows: int, length: int, source: int
) -> StepMemory:
    """Return the model's memory with what the reader has read, made anew where it is too small."""
    memory = _MEMORIES.get(model)
    if memory is None or not memory.holds(reader, rows, length, source):
        sizes = rows, length, source
        if memory is not None:
            sizes = tuple(map(max, sizes, (memory.rows, memory.length, memory.source)))
            del memory, _MEMORIES[model]
        memory = _MEMORIES[model] = StepMemory(reader, *sizes)
    captures = can_capture(model)
    state = captured_state(model) if captures else None
    if memory.captured_of != state:
        memory.captured_of = state
        memory.forget(captures)
    memory.load(reader)
    return memory


def _is_small(memory: StepMemory | None) -> bool:
    if memory is None or memory.tokens.device.type != "cuda":
        return True
    return memory.num_bytes <= KEPT_SHARE * torch.cuda.get_device_properties(memory.tokens.device).total_memory


def bucket(rows: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is not below `rows`."""
    power = 1 << (rows - 1).bit_length()
    return power if power < 4 or power * 3 // 4 < rows else power * 3 // 4


def open_first(done: Sequence[bool]) -> list[int]:
    """Order the rows that are still open: they stay, and the last of them take the gaps of finished ones."""
    rows = done.count(False)
    movers = iter([row for row in range(rows, len(done)) if not done[row]])
    return [next(movers) if done[row] else row for row in range(rows)]


def _columns(tokens: int) -> int:
    return -(-tokens // COLUMNS) * COLUMNS
