"""Which numbers a machine computes with: what it does by itself, and what it cannot."""

import os
import sys

import torch
from accelerate import PartialState

from pipeline.runtime.devices import has_accelerator


def native_bf16() -> bool:
    """Whether this machine has instructions for bfloat16: emulated, it is slower than float32, on a CPU many times."""
    if has_accelerator():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Of what the processor has, torch may have been told to leave the wide vectors alone (ATEN_CPU_CAPABILITY).
    wide, capabilities = torch.backends.cpu.get_cpu_capability().startswith("AVX512"), torch.cpu.get_capabilities()
    return wide and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def mixed_precision(section: str, bf16: bool | None) -> str:
    """Choose what passes are computed in, as accelerate calls it; None is bf16 where the machine is fast at it.

    Raises:
        ValueError: bf16 is asked for and the machine has none.
    """
    check_precision(section, bf16=bf16)
    return "bf16" if bf16 or (bf16 is None and native_bf16()) else "no"


def check_precision(section: str, fp16: bool | None = None, bf16: bool | None = None) -> None:
    """Refuse a precision that this machine does not have, and warn of bf16 on a CPU without instructions for it.

    Raises:
        ValueError: naming the key and what to set.
    """
    device = torch.accelerator.current_accelerator() if has_accelerator() else torch.device("cpu")
    if fp16 and device.type == "cpu":
        raise ValueError(
            f"{section}.fp16: a CPU has no mixed precision in float16; set {section}.fp16: false, or bf16: true"
        )
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"{section}.bf16: {torch.cuda.get_device_name()} has no bfloat16; set {section}.bf16: false for float32"
        )
    # By the launcher's variable: a PartialState made here would keep the device and the processes that it sees now.
    if bf16 and device.type == "cpu" and not native_bf16() and os.environ.get("RANK", "0") == "0":
        print(
            f"{section}.bf16: this CPU has no instructions for bfloat16, so it takes many times as long as float32; "
            "without the key bfloat16 is used where it is fast",
            file=sys.stderr,
        )


def sampling_autocast(bf16: bool | None) -> torch.autocast:
    """Compute samples that are learnt from in bfloat16 on a GPU that is fast at it, unless `bf16` is False.

    On a CPU they stay in float32, as in recorded runs.
    """
    kind = PartialState().device.type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" and bf16 is not False and native_bf16())
