"""Settings that SFT and reward modelling complete in the same way, before or after TRL's config classes see them."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, TrainingArguments

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


def decide_ddp_search(args: TrainingArguments, config: PretrainedConfig) -> None:
    """Let DDP not search for unused weights where there are none: transformers has it search, at each step.

    It does so under an adapter, and for a model that is none of its own.
    """
    if args.ddp_find_unused_parameters is None and uses_all_weights(config):
        args.ddp_find_unused_parameters = False


def uses_all_weights(config: PretrainedConfig) -> bool:
    """Tell whether every pass reads all weights of a model: no experts, no dropped layers, no parts for images.

    Of models that come with code of their own nothing is known.
    """
    keys = config.to_dict()
    drops_layers = any(value for key, value in keys.items() if key.endswith("layerdrop"))
    has_experts = any("expert" in key or "router" in key for key in config.get_text_config().to_dict())
    return not (drops_layers or has_experts or "auto_map" in keys or config.get_text_config() is not config)
