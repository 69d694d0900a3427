"""Which numbers a machine computes with: what it does by itself, and what it cannot."""

import torch


def native_bf16() -> bool:
    """Whether there is an accelerator with bfloat16 in hardware: emulated, it is slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def check_precision(section: str, fp16: bool | None = None, bf16: bool | None = None) -> None:
    """Refuse a precision that this machine does not have; bf16 on a CPU works.

    Raises:
        ValueError: naming the key and what to set.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if fp16 and device.type == "cpu":
        raise ValueError(
            f"{section}.fp16: a CPU has no mixed precision in float16; set {section}.fp16: false, or bf16: true"
        )
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"{section}.bf16: {torch.cuda.get_device_name()} has no bfloat16; set {section}.bf16: false for float32"
        )
