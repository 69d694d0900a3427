"""Weights in the precision of autocast while completions are written: else they are cast again for each token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.runtime.memory import cleared_with, is_out_of_memory

# At fixed addresses, which CUDA graphs read.
_NARROW: WeakKeyDictionary[nn.Linear, nn.Parameter] = WeakKeyDictionary()
cleared_with(_NARROW.clear)  # layers that use them meanwhile hold them themselves


@contextmanager
def narrow_weights(model: PreTrainedModel) -> Iterator[None]:
    """Replace the float32 weights of linear layers by what autocast would cast them to, until the block ends.

    The results are the same bits. Variants of LoRA, which compute with the weights themselves, are left as they are.
    Autocast itself remembers the casts of weights that train, in a pass without a graph, and of no others. Where there
    is no memory for the casts of all, none is kept, by autocast neither.
    """
    kind = model.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype, layers = torch.get_autocast_dtype(kind), _layers(model)
    if not _make_room(layers, dtype):
        torch.clear_autocast_cache()
        with torch.autocast(kind, dtype, cache_enabled=False):
            yield
        return
    weights = [layer.weight for layer in layers]
    try:
        if layers:
            with torch.no_grad():
                torch._foreach_copy_([_NARROW[layer] for layer in layers], weights)
        for layer in layers:
            layer.weight = _NARROW[layer]
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def _layers(model: PreTrainedModel) -> list[nn.Linear]:
    variants = {m for m in model.modules() if isinstance(m, LoraLayer) and m.lora_variant}
    left = {layer for variant in variants for layer in variant.modules()}
    layers = [m for m in model.modules() if type(m) is nn.Linear and m not in left and m.weight.dtype == torch.float32]
    return [layer for layer in layers if not isinstance(layer.weight, DTensor)]


def _make_room(layers: Sequence[nn.Linear], dtype: torch.dtype) -> bool:
    """Keep a narrow weight for each layer; return whether there was memory for it."""
    try:
        for layer in layers:
            kept, weight = _NARROW.get(layer), layer.weight
            if kept is None or (kept.dtype, kept.device, kept.shape) != (dtype, weight.device, weight.shape):
                _NARROW[layer] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for layer in layers:
            _NARROW.pop(layer, None)
        return False
    return True
