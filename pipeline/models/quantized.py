"""Dense layers in 4 bits that compute the same whether or not a gradient is wanted.

bitsandbytes has one kernel for inference and another way for training, and on a CPU it rearranges a layer's weights on
its first use in evaluation, from which there is no gradient any more. PPO scores a rollout without gradients and then
trains on it: its first ratio is exactly 1 only if both are one computation.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit


def use_one_product(model: nn.Module) -> None:
    """Give every layer in 4 bits the same forward pass for scoring and for training."""
    from bitsandbytes.nn import Linear4bit  # an optional extra

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.forward = partial(_forward, module)


def _forward(layer: "Linear4bit", x: Tensor) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _Product.apply(x.to(dtype), layer.weight, None if layer.bias is None else layer.bias.to(dtype))


class _Product(torch.autograd.Function):
    """`x W^T + b` for a frozen W in 4 bits, which is unpacked again for the gradient of x rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed = packed  # frozen: no tensor that autograd has to watch
        return functional.linear(x, _unpacked(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ _unpacked(ctx.packed, gradient.dtype), None, None


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, packed.quant_state).to(dtype)
