"""Say what a run computes on: an accelerator, or the CPU, also where the only accelerator is Apple's GPU."""

import torch

APPLE_GPU_IDLE = "Apple's GPU (mps) is not used, because it has no float64: everything runs on the CPU"


def has_accelerator() -> bool:
    """Tell whether there is an accelerator that Relay uses."""
    return torch.accelerator.is_available() and not has_apple_gpu()


def has_apple_gpu() -> bool:
    """Tell whether the accelerator of this machine is Apple's GPU."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "mps"
