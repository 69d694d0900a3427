"""LoRA layers in fewer operations: peft's own forward makes nine passes over memory where one product is enough.

In float32 the adapter is added into a copy of the weight once for each optimizer step, and forward passes, those of
generation too, are plain products. Under autocast it stays apart: a small change added to a weight in bfloat16 would
be rounded away. There the copy is the frozen weight in autocast's precision, which autocast itself would cast anew in
every forward pass. The gradients of the adapter are those of peft, without keeping what it keeps for them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

# Copies of more bytes than this are not made: a large model gains little time from them, and has no memory to spare.
COPY_BUDGET = 2**30


class _AdaptedProduct(torch.autograd.Function):
    """`x W'^T + b` with gradients for x and the adapter, where W' = W + scaling * up @ down.

    `weight` is W' if `merged`, else W. x is [N, in], down [r, in], up [out, r].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        merged: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling, ctx.merged = scaling, merged
        output = functional.linear(x, weight, bias)
        if not merged:
            output.addmm_(x @ down.T, up.T, alpha=scaling)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        reduced = (gradient @ up) * ctx.scaling
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ weight
            if not ctx.merged:
                x_gradient.addmm_(reduced, down)
        down_gradient = reduced.T @ x
        up_gradient = (gradient.T @ (x @ down.T)) * ctx.scaling
        return x_gradient, None, None, down_gradient, up_gradient, None, None


def fuse_adapters(network: nn.Module) -> None:
    """Give every plain LoRA layer over a dense layer the fused forward pass, without dropout.

    Other layers (DoRA, quantised or transposed weights, an adapter with a bias) keep peft's.
    """
    layers = [m for m in network.modules() if type(m) is LoraLinear and _is_plain(m)]
    size = sum(layer.base_layer.weight.numel() * layer.base_layer.weight.element_size() for layer in layers)
    for layer in layers:
        layer.forward = partial(_forward, layer, _Copy() if size <= COPY_BUDGET else None, layer.forward)


class _Copy:
    """The last copy of a layer's weight, and which state of the parameters it was made from."""

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.weight: Tensor | None = None


def _is_plain(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and layer.base_layer.weight.dtype in (torch.float32, torch.float64)
        and len(layer.active_adapters) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def _forward(layer: LoraLinear, copy: _Copy | None, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    base, name = layer.base_layer, layer.active_adapters[0]
    if layer.disable_adapters or layer.merged or name not in layer.lora_A:
        return base(x)
    if name in layer.lora_variant or layer.lora_bias[name]:  # of another adapter, which came later
        return plain(x)
    down, up, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    merged = copy is not None and dtype == base.weight.dtype
    with torch.autocast(device, enabled=False):
        weight = _weight(base.weight, down, up, scaling, dtype, merged, copy)
        bias = None if base.bias is None else base.bias.to(dtype)
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        output = _AdaptedProduct.apply(flat, weight, bias, down.to(dtype), up.to(dtype), scaling, merged)
    return output.view(*x.shape[:-1], output.shape[-1])


@torch.no_grad()
def _weight(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, dtype: torch.dtype, merged: bool, copy: _Copy | None
) -> Tensor:
    """W + scaling * up @ down if `merged`, else W, in `dtype`; made anew only when a parameter changed."""
    if copy is None:
        return weight.to(dtype)
    parts = (weight, down, up) if merged else (weight,)
    key = (dtype, *((part.data_ptr(), part._version) for part in parts))
    if copy.key != key:
        copy.key = key
        copy.weight = torch.addmm(weight, up, down, alpha=scaling) if merged else weight.to(dtype)
    return copy.weight
