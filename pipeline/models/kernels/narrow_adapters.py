"""Adapters in the precision of autocast while completions are written: else their weights are cast for each token."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

# At fixed addresses, which CUDA graphs read.
_NARROW: WeakKeyDictionary[nn.Linear, nn.Parameter] = WeakKeyDictionary()


@contextmanager
def narrow_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Replace the weights of active LoRA layers by what autocast would cast them to, until the block ends.

    The results are the same bits. Variants of LoRA, which compute with the weights themselves, are left as they are.
    """
    kind = model.device.type
    layers = _narrowable(model, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else []
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


def _narrowable(model: PreTrainedModel, dtype: torch.dtype) -> list[nn.Linear]:
    adapter_layers = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.disable_adapters and not module.lora_variant:
            names = [name for name in module.active_adapters if name in module.lora_A]
            adapter_layers += [layers[name] for name in names for layers in (module.lora_A, module.lora_B)]
    layers = [layer for layer in adapter_layers if type(layer) is nn.Linear and layer.weight.dtype == torch.float32]
    for layer in layers:
        kept = _NARROW.get(layer)
        if kept is None or kept.dtype != dtype or kept.device != layer.weight.device:
            _NARROW[layer] = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layers
