"""What the plan says of PPO under FSDP2: how rollouts get at the weights that the processes share, and the cost."""

import torch

from pipeline.models.loading import language_model_class, load_config, weights_dtype
from pipeline.models.sharding import SHARE_OF_MEMORY, device_memory, gathered_bytes, repeated_layers
from pipeline.recipe import Recipe

GB = 1e9


def sharding_line(recipe: Recipe, processes: int, memory: int | None = None) -> str:
    """Describe how `processes` that share the base write completions on devices of `memory` bytes; None: of this one.

    The base is not loaded for it. Where its configuration is not on this machine yet, the rule is described.
    """
    begin, limit = f"FSDP2 over {processes} processes; rollouts", SHARE_OF_MEMORY * (memory or device_memory())
    size = _whole_bytes(recipe)
    if size is None:
        return (
            f"{begin} gather the whole base once each where it takes at most {limit / GB:.1f} GB, half of a device, "
            "and else every layer for every token"
        )
    if size <= limit:
        return f"{begin} gather the whole base once each: {size / GB:.1f} GB on a device, of at most {limit / GB:.1f}"
    return (
        f"{begin} gather every layer for every token, all processes in step: {size / GB:.1f} GB through a device for "
        f"a token, because the whole base would take more than {limit / GB:.1f} GB, half of it"
    )


def _whole_bytes(recipe: Recipe) -> int | None:
    """Count the bytes of the gathered base; None for a model that cannot be described without its files."""
    path = recipe.ppo.sft_model_path or recipe.model.model_name_or_path
    if path is None or (recipe.model.from_scratch is not None and not recipe.sft_is_external):
        return None
    try:
        config = load_config(path, recipe.model)
        with torch.device("meta"):
            model = language_model_class(config).from_config(config)
    except (ValueError, OSError):  # the stage says what is wrong
        return None
    dtype = weights_dtype(recipe.model, frozen=recipe.ppo.use_peft, bf16_gpu=False)
    if dtype != "auto":
        model.to(dtype)
    return gathered_bytes(model, repeated_layers(model))
