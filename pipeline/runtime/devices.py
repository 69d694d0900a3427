"""Say what a run computes on, and where exact sums are taken: Apple's GPU is not used, and has no float64."""

import torch
from torch import Tensor

APPLE_GPU_IDLE = "Apple's GPU (mps) is not used, because no run on it has been tested: everything runs on the CPU"


def has_accelerator() -> bool:
    """Tell whether there is an accelerator that Relay uses."""
    return torch.accelerator.is_available() and not has_apple_gpu()


def has_apple_gpu() -> bool:
    """Tell whether the accelerator of this machine is Apple's GPU."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "mps"


def float64_device(device: torch.device) -> torch.device:
    """Return where the numbers of `device` can be held in float64: there, or on the CPU if `device` is Apple's GPU."""
    return torch.device("cpu") if device.type == "mps" else device


def in_float64(values: Tensor) -> Tensor:
    """Widen numbers to float64, on `float64_device`: all float64 of rollouts and updates is made here and below."""
    return values.to(float64_device(values.device)).double()


def sum_in_float64(values: Tensor, dim: int) -> Tensor:
    """Sum along a dimension in float64, on `float64_device`, without a wide copy of the numbers."""
    return values.to(float64_device(values.device)).sum(dim, dtype=torch.float64)


def gpu_has_bf16(device: torch.device) -> bool:
    """Tell whether a device is a GPU with instructions for bfloat16: emulated, it is slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
