"""Weights in the precision of autocast while completions are written: else they are cast again for each token."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# At fixed addresses, which CUDA graphs read.
_NARROW: WeakKeyDictionary[nn.Linear, nn.Parameter] = WeakKeyDictionary()


@contextmanager
def narrow_weights(model: PreTrainedModel) -> Iterator[None]:
    """Replace the float32 weights of linear layers by what autocast would cast them to, until the block ends.

    The results are the same bits. Variants of LoRA, which compute with the weights themselves, are left as they are.
    Autocast itself remembers the casts of weights that train, in a pass without a graph, and of no others.
    """
    kind = model.device.type
    layers = _narrowed(model, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else []
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


def _narrowed(model: PreTrainedModel, dtype: torch.dtype) -> list[nn.Linear]:
    """Return the layers with room for narrow weights; none where memory runs out, which only takes longer."""
    variants = {m for m in model.modules() if isinstance(m, LoraLayer) and m.lora_variant}
    left = {layer for variant in variants for layer in variant.modules()}
    layers = [m for m in model.modules() if type(m) is nn.Linear and m not in left and m.weight.dtype == torch.float32]
    layers = [layer for layer in layers if not isinstance(layer.weight, DTensor)]
    try:
        for layer in layers:
            kept, weight = _NARROW.get(layer), layer.weight
            if kept is None or (kept.dtype, kept.device, kept.shape) != (dtype, weight.device, weight.shape):
                _NARROW[layer] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    except (torch.OutOfMemoryError, MemoryError):
        for layer in layers:
            _NARROW.pop(layer, None)
        return []
    return layers
