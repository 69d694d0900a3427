"""Settings that SFT and reward modelling complete in the same way before TRL's config classes see them."""

from collections.abc import Mapping
from typing import Any

from pipeline.runtime.devices import has_accelerator
from pipeline.trainers.precision import check_precision, native_bf16
from pipeline.trainers.trackers import installed


def complete_arguments(section: str, defaults: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a section's `arguments` over Relay's `defaults`, then fill in bf16 and trackers for this machine.

    TRL defaults to bf16 and refuses it on a machine without an accelerator. Relay uses bf16 where the machine has
    instructions for it, on an accelerator or on a CPU.

    Raises:
        ValueError: a precision, or an offload of activations, that this machine does not support.
    """
    settings = {**defaults, **arguments}
    settings["report_to"] = installed(settings["report_to"]) or "none"
    if settings.get("bf16") is None and not settings.get("fp16"):
        settings["bf16"] = native_bf16()
    check_precision(section, settings.get("fp16"), settings.get("bf16"))
    if settings.get("activation_offloading") and not has_accelerator():
        raise ValueError(f"{section}.activation_offloading: activations are on the CPU already; remove the key")
    if settings["eval_strategy"] == "no" and "load_best_model_at_end" not in arguments:
        settings["load_best_model_at_end"] = False
    settings.setdefault("disable_tqdm", False)  # transformers hides its bar where its log level is raised
    return settings
