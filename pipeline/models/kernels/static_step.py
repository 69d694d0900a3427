"""The pass for one more token at fixed addresses: computed, or captured as a CUDA graph and replayed."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from pipeline.models.kernels.decode_loop import CausalReader, DecoderReader, PreallocatedCacheLayer, cache_argument

WARM_UPS = 2  # passes before a capture, in which libraries allocate what they keep


class StaticCacheLayer(StaticLayer):
    """A cache layer of fixed length. The states of a token are written to the column that is its row's position."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take `keys, values [N, heads, L, D]`, and the `positions [N]` of the next tokens, changed from outside."""
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.positions, self.is_initialized = keys, values, positions, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the states of one token of each row; return all columns."""
        for states, room in ((key_states, self.keys), (value_states, self.values)):
            columns = self.positions.view(-1, 1, 1, 1).expand(states.shape)
            room.scatter_(2, columns, states.to(room.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> Tensor:
        """Return the position of the next token, of which decoders of encoder-decoders have one for all rows."""
        return self.positions[0]


class StaticStep:
    """One more token of the first `rows` rows of a memory, with caches of `length` and `source` columns."""

    def __init__(self, memory: "StepMemory", rows: int, length: int, source: int) -> None:
        self.tokens, self.positions = memory.tokens[:rows].unsqueeze(1), memory.positions[:rows]
        self.columns, self.last = memory.columns[:length], memory.last
        growing = [
            StaticCacheLayer(keys[:rows, :, :length], values[:rows, :, :length], self.positions)
            for keys, values in memory.growing
        ]
        self.cache, self.dtype = Cache(layers=growing), memory.growing[0][1].dtype
        self.source_mask = self.source_states = None
        if source:
            fixed = [
                PreallocatedCacheLayer(keys[:rows, :, :source], values[:rows, :, :source])
                for keys, values in memory.fixed
            ]
            self.cache = EncoderDecoderCache(self.cache, Cache(layers=fixed))
            self.source_mask = memory.source_mask[:rows, :, :, :source]
            self.source_states = memory.source_states.expand(rows, source, -1)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def run(self, model: PreTrainedModel) -> Tensor:
        """Read the tokens and return the logits [rows, V] of the next ones; the next run may overwrite them."""
        if self.graph is None:
            return self.compute(model)
        self.graph.replay()
        return self.logits

    def compute(self, model: PreTrainedModel) -> Tensor:
        """Do so without a graph."""
        unread = (self.columns > self.positions.unsqueeze(1)).to(self.dtype)
        mask = (unread * lowest(self.dtype))[:, None, None]
        inputs = {cache_argument(model): self.cache, "use_cache": True}
        if self.source_states is None:
            inputs |= {"input_ids": self.tokens, "attention_mask": mask, "position_ids": self.positions.unsqueeze(1)}
        else:
            inputs |= {"decoder_input_ids": self.tokens, "decoder_attention_mask": mask}
            inputs |= {"encoder_outputs": BaseModelOutput(self.source_states), "attention_mask": self.source_mask}
        logits = model(**inputs).logits[:, -1]
        self.positions.add_(1).clamp_(max=self.last)  # a finished row goes on writing to the last column
        return logits

    def capture(self, model: PreTrainedModel, recorder: "Recorder") -> None:
        """Record the step, to be replayed from now on.

        Raises:
            RuntimeError: something in the pass cannot be captured, or a replay gives other logits.
        """
        start, kind = self.positions.clone(), self.tokens.device.type
        # Casts that autocast remembers are freed where it ends, and a graph would go on reading what is there then.
        precision = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

        def compute() -> Tensor:  # again and again: each time the same states are written
            self.positions.copy_(start)
            return self.compute(model)

        try:
            with torch.autocast(kind, **precision, cache_enabled=False):
                expected = recorder.warm_up(compute)
                self.positions.copy_(start)
                graph, logits = recorder.record(lambda: self.compute(model))
            self.positions.copy_(start)
            graph.replay()
            if not torch.allclose(logits, expected, rtol=0.01, atol=0.01, equal_nan=True):
                raise RuntimeError("a replay gives other logits than the pass")
        finally:
            self.positions.copy_(start)
        self.graph, self.logits = graph, logits


class Recorder:
    """Capture CUDA graphs that are replayed one at a time and share the memory of their intermediate results.

    All are captured on one stream that no other recorder uses: some versions of torch free what cuBLAS works in on a
    stream with the first of its graphs.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a few times, in which libraries allocate what they keep; return the last result."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = [compute() for _ in range(WARM_UPS)]
        torch.cuda.current_stream().wait_stream(self._stream)
        return results[-1]

    def record(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture a pass, which is not computed meanwhile; return its graph, and the tensor of its results."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may go on: a capture cares for this one alone.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                return graph, compute()
        except RuntimeError:
            # Where a capture fails, torch does not tell its allocator that it is over, which then frees nothing more.
            with suppress(RuntimeError):  # it has been told
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise
        finally:
            torch.cuda.set_stream(current)  # a capture that fails stays on its own stream


class StepMemory:
    """The fixed memory of a model's decoding, and the steps on it by rows and columns.

    A step reads `tokens [R]` and `positions [R]`, writes to the caches `growing` and adds 1 to the positions, up to
    the `last` that a row can need. `fixed` are the caches of what an encoder-decoder's decoder reads of its source.
    """

    def __init__(self, reader: CausalReader | DecoderReader, rows: int, length: int, source: int) -> None:
        self.rows, self.length, self.source, device = rows, length, source, reader.logits.device
        self.tokens, self.positions = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.columns, self.last = torch.arange(length, device=device), torch.zeros((), dtype=torch.long, device=device)
        self.growing = [_room(layer, rows, length) for layer in reader.growing]
        self.fixed = [_room(layer, rows, source) for layer in reader.fixed]
        self.source_mask = self.source_states = None
        if source:
            self.source_mask = torch.zeros(rows, 1, 1, source, dtype=self.growing[0][1].dtype, device=device)
            self.source_states = reader.states.new_zeros(1, 1, reader.states.shape[-1])
        self.captured_of: object = None
        self.forget(False)

    def forget(self, captures: bool) -> None:
        """Forget all steps; later ones are captured if `captures` is set."""
        self._steps: dict[tuple[int, int, int], StaticStep] = {}
        self._recorder = Recorder() if captures else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches."""
        return sum(tensor.nbytes for room in (*self.growing, *self.fixed) for tensor in room)

    def holds(self, reader: CausalReader | DecoderReader, rows: int, length: int, source: int) -> bool:
        """Tell whether what a reader has read fits in."""
        same = self.growing[0][1].dtype == reader.growing[0].values.dtype
        return same and rows <= self.rows and length <= self.length and source <= self.source

    def load(self, reader: CausalReader | DecoderReader, rows: Tensor) -> None:
        """Take over into `rows [N]` what the reader has read, aligned to the left. A source fills the first N rows."""
        count, width = len(rows), reader.growing[0].keys.shape[2]
        self.positions[rows] = reader.positions
        columns = self.columns[:width] + width - reader.positions.unsqueeze(1)
        columns = columns.clamp(max=width - 1).view(count, 1, width, 1)
        for room, layer in zip(self.growing, reader.growing, strict=True):
            for target, states in zip(room, (layer.keys, layer.values), strict=True):
                target[rows] = 0  # unread columns count 0 times what is there, which must be a number
                target[rows, :, :width] = states.gather(2, columns.expand(states.shape)).to(target.dtype)
        if self.source:
            width, mask = reader.mask.shape[1], self.source_mask
            mask.zero_()
            mask[:count] = lowest(mask.dtype)
            mask[:count, 0, 0, :width] *= ~reader.mask.bool()
            for room, layer in zip(self.fixed, reader.fixed, strict=True):
                for target, states in zip(room, (layer.keys, layer.values), strict=True):
                    target.zero_()
                    target[:count, :, :width] = states

    def move_rows(self, order: Sequence[int]) -> None:
        """Put the row at `order[i]` where row i was."""
        moved = [(row, source) for row, source in enumerate(order) if row != source]
        if moved:
            targets, sources = torch.tensor(moved, device=self.tokens.device).unbind(1)
            rooms = [tensor for room in (*self.growing, *self.fixed) for tensor in room]
            for tensor in (self.positions, *rooms, *([self.source_mask] if self.source else [])):
                tensor[targets] = tensor[sources]

    def step(self, model: PreTrainedModel, rows: int, length: int, source: int) -> Tensor:
        """Read the tokens of the first `rows` rows; return the logits [rows, V] of the next, until the next step."""
        key = rows, length, source
        if key not in self._steps:
            step = StaticStep(self, *key)
            if self._recorder is not None:
                self._capture(model, step)
            self._steps[key] = step
        return self._steps[key].run(model)

    def _capture(self, model: PreTrainedModel, step: StaticStep) -> None:
        try:
            step.capture(model, self._recorder)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._recorder = None
            if PartialState().is_main_process:
                text = (
                    f"warning: {model.config.model_type}: the pass that writes a token cannot be captured as a CUDA "
                    f"graph ({' '.join(str(error).split())[:200]}); completions are the same and take longer"
                )
                tqdm.write(text, file=sys.stderr)


def _room(layer: PreallocatedCacheLayer, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    # Keys in the precision of values: under autocast attention would cast them to it again for each token.
    dtype = layer.values.dtype
    keys, values = (
        x.new_zeros(rows, x.shape[1], columns, x.shape[3], dtype=dtype) for x in (layer.keys, layer.values)
    )
    return keys, values


def lowest(dtype: torch.dtype) -> float:
    """Return what masks a score: softmax is taken in float32, where the lowest float64 would be -inf, and NaN."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def can_capture(model: PreTrainedModel) -> bool:
    """Tell whether the weights are whole on one CUDA device, and not in shards that are gathered for a pass."""
    return model.device.type == "cuda" and all(
        p.device == model.device and p.numel() > 0 and not isinstance(p, DTensor) for p in model.parameters()
    )


def captured_state(model: PreTrainedModel) -> object:
    """Return what a graph has fixed: where the weights lie, which adapters are on, and the precision."""
    kind = model.device.type
    adapters = [
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), model.training
    addresses = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    return precision, model.config._attn_implementation, adapters, addresses
