"""Decode with static shapes: one more token of every row is one replay of a CUDA graph.

The decode loop launches thousands of small kernels for each token, and a GPU waits for Python. Here all that the pass
for one token reads and writes lies at fixed addresses: it is captured once for each bucket of rows and replayed from
then on. Rows are aligned to the left, so that a row's next position is also its column in the cache. Finished rows are
computed on until waiting prompts take their places, or the others fit a smaller bucket. A pass that cannot be captured
is computed at the same addresses.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.kernels.decode_loop import (
    CausalReader,
    Choose,
    DecoderReader,
    Stop,
    make_reader,
    supports_decode_loop,
)
from pipeline.models.kernels.packing import IMPLEMENTATIONS, PREFIX
from pipeline.models.kernels.static_step import StepMemory, can_capture, captured_state
from pipeline.models.loading import sliding_window
from pipeline.models.speech import reads_sound
from pipeline.runtime.memory import cleared_with

COLUMNS = 128  # a cache has a multiple of so many columns
LOOK = 8  # tokens after which the ends are looked at: each look waits for the device
# Waiting prompts are read once so many rows are free. To read a few takes as long as to write several tokens of all.
REFILL_SHARE = 1 / 4

# What may be kept from one batch to the next, as a share of the device's memory: the update needs the rest.
KEPT_SHARE = 1 / 16
# Kept because a capture takes as long as many replays. They refer to no model.
_MEMORIES: WeakKeyDictionary[PreTrainedModel, StepMemory] = WeakKeyDictionary()
cleared_with(_MEMORIES.clear)


def supports_static_decode(model: PreTrainedModel) -> bool:
    """Whether the decode loop knows the model, transformers gives it static caches, and its attention takes a mask.

    Models that hear sound take no mask for what the encoder has read. All layers are given one mask, so that texts
    beyond a sliding window are left to the decode loop: see `within_window`.
    """
    if reads_sound(model.config):
        return False
    attention = model.config._attn_implementation.removeprefix(PREFIX)
    return attention in IMPLEMENTATIONS and model._can_compile_fullgraph and supports_decode_loop(model)


def within_window(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Whether no text, with its prompt, can be longer than the model's sliding window, if it has one."""
    window = sliding_window(model.config)
    return window is None or max(map(len, prompts)) + max_new_tokens <= window


def supports_refill(model: PreTrainedModel) -> bool:
    """Whether prompts that wait may take the places of finished rows.

    The decoders of encoder-decoders have one position for all rows.
    """
    return supports_static_decode(model) and not model.config.is_encoder_decoder


@torch.no_grad()
def decode_static(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    max_new_tokens: int,
    ends: Sequence[int],
    choose: Choose,
    stop: Stop | None = None,
    at_once: int | None = None,
) -> list[list[int]]:
    """Write what `decode_batch` writes: one completion for each prompt, up to the first of `ends` or a stop.

    At most `at_once` texts are written at a time, where the model `supports_refill`: the other prompts wait for a row.
    """
    written, count = None, min(at_once or len(prompts), len(prompts))
    try:
        batch = DecodeBatch(model, prompts, pad_id, max_new_tokens, count)
        written = _decode(batch, torch.tensor(list(ends), device=model.device), choose, stop)
    finally:  # where memory ran out, smaller batches need what is kept here
        if written is None or not _is_small(_MEMORIES.get(model)):
            _MEMORIES.pop(model, None)
    return written


def _decode(batch: "DecodeBatch", ending: Tensor, choose: Choose, stop: Stop | None) -> list[list[int]]:
    count, limit, time, looked = len(batch.prompts), batch.max_new_tokens, 0, 0
    written = torch.zeros(count, limit, dtype=torch.long, device=ending.device)
    lengths = torch.full((count,), limit, device=ending.device)
    logits = batch.read(time)
    while True:
        live, steps = batch.live, time - batch.start
        chosen = choose(logits.float(), steps, live)
        written[live, steps] = chosen
        ended = (chosen.unsqueeze(1) == ending).any(1)
        lengths[live] = torch.where(ended, lengths[live].clamp(max=steps + 1), lengths[live])
        time += 1
        looks = time % LOOK == 0 or time - batch.begun[0] == limit
        if looks:
            for texts, counts in batch.new_tokens(looked, time) if stop is not None else ():
                for tokens in counts:
                    stopped = stop(texts, written[texts, :tokens])
                    lengths[texts] = torch.where(stopped, lengths[texts].clamp(max=tokens), lengths[texts])
            looked, done = time, (lengths[live] <= steps + 1).tolist()
            if all(done) and not batch.waiting:
                return [row[:length] for row, length in zip(written.tolist(), lengths.tolist(), strict=True)]
            chosen = batch.leave(done, chosen)
        logits = batch.step(chosen, time, looks)


class DecodeBatch:
    """Which text each row of the memory writes, since when, and which prompts wait for a row.

    `texts`, `rows` and `begun` have the number of each unfinished text, its row, and the time of its first token, the
    oldest first. On the device `live [N]` are the texts, and `start` the times: one number where all are equal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        max_new_tokens: int,
        at_once: int,
    ) -> None:
        self.model, self.prompts, self.pad_id, self.max_new_tokens = model, prompts, pad_id, max_new_tokens
        self.at_once, self.waiting = at_once, range(len(prompts))
        self.texts: list[int] = []
        self.rows: list[int] = []
        self.begun: list[int] = []
        self._bucket, self._width, self._source, self._memory = bucket(at_once), 0, 0, None

    def read(self, time: int) -> Tensor:
        """Let waiting prompts take all free rows; return the logits [n, V] of their first tokens."""
        free = sorted(set(range(self.at_once)) - set(self.rows))[: len(self.waiting)]
        texts, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        reader = make_reader(self.model, [self.prompts[text] for text in texts], self.pad_id)
        self.texts, self.rows = [*self.texts, *texts], [*self.rows, *free]
        self.begun = [*self.begun, *[time] * len(free)]
        self._update()
        if self.max_new_tokens > 1:
            self._width, self._source = max(self._width, reader.width), _columns(reader.source_width)
            if self._memory is None:
                longest = max([self._width, *(len(self.prompts[text]) for text in self.waiting)])
                length = _columns(longest + self.max_new_tokens)
                self._memory = _memory(self.model, reader, self._bucket, length, self._source)
            self._memory.last.fill_(self._width + self.max_new_tokens - 1)
            self._memory.load(reader, torch.tensor(free, device=self.model.device))
        return reader.logits

    def new_tokens(self, looked: int, time: int) -> list[tuple[Tensor, range]]:
        """Return the texts that began together, and how many tokens they had at each time after `looked`."""
        groups = [[i for i, begun in enumerate(self.begun) if begun == start] for start in sorted(set(self.begun))]
        starts = [(self.live[group], self.begun[group[0]]) for group in groups]
        return [(live, range(max(looked - start, 0) + 1, time - start + 1)) for live, start in starts]

    def leave(self, done: Sequence[bool], chosen: Tensor) -> Tensor:
        """Let texts that are done leave, and the others move to a smaller bucket if nothing waits.

        Returns the tokens `chosen` for those that stay.
        """
        kept = [i for i, is_done in enumerate(done) if not is_done]
        self.texts, self.rows, self.begun = (
            [values[i] for i in kept] for values in (self.texts, self.rows, self.begun)
        )
        if kept and not self.waiting and bucket(len(kept)) < self._bucket:
            self._bucket, order = bucket(len(kept)), open_first([row not in self.rows for row in range(self.at_once)])
            self._memory.move_rows(order)
            self.rows = [order.index(row) for row in self.rows]
            self._update()
        elif 0 < len(kept) < len(done):
            self._update()
        return chosen if len(kept) == len(done) else chosen[torch.tensor(kept, dtype=torch.long, device=chosen.device)]

    def step(self, chosen: Tensor, time: int, looks: bool) -> Tensor:
        """Read the tokens `chosen`; return the logits of the next ones, after a look those of new texts too."""
        logits, free = [], self.at_once - len(self.texts)
        if self.texts:
            self._memory.tokens[self._index] = chosen
            length = _columns(self._width + self.max_new_tokens)
            logits.append(self._memory.step(self.model, self._bucket, length, self._source)[self._index])
        if looks and self.waiting and free >= REFILL_SHARE * self.at_once:
            logits.append(self.read(time))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _update(self) -> None:
        device, first = self.model.device, list(range(len(self.rows)))
        self.live = torch.tensor(self.texts, device=device)
        self._index = slice(len(first)) if self.rows == first else torch.tensor(self.rows, device=device)
        together = self.begun[0] == self.begun[-1]
        self.start: int | Tensor = self.begun[0] if together else torch.tensor(self.begun, device=device)


def _memory(
    model: PreTrainedModel, reader: CausalReader | DecoderReader, rows: int, length: int, source: int
) -> StepMemory:
    """Return the model's memory, made anew where it is too small for what the reader has read."""
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
    memory.positions.zero_()  # of rows that nothing is loaded into
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
