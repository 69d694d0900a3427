"""Saves trained models with plain weights, gathered where DeepSpeed's ZeRO-3 or FSDP shards them."""

from pathlib import Path

from accelerate.utils import DistributedType, parse_flag_from_env
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_config, merged
from pipeline.models.processors import save_processor

CHANGED_KEYS = ("output_router_logits", "router_aux_loss_coef", "use_cache")


def check_sharding(arguments: TrainingArguments, in_4_bits: bool) -> None:
    """Refuse, before a model is loaded, settings with which sharded weights could not be loaded or gathered.

    Raises:
        ValueError: naming the setting of accelerate launch, or the key.
    """
    plugin = arguments.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"] if plugin is not None else {"stage": 0}
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "deepspeed_config: ZeRO-3 could not save whole weights without zero3_save_16bit_model: true; set it in "
            "the file that accelerate launch is given, as accelerate_configs/deepspeed_zero3.yaml does"
        )
    if in_4_bits and (zero["stage"] == 3 or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        raise ValueError(
            "model.load_in_4bit: weights in 4 bits are not sharded; use accelerate_configs/multi_gpu.yaml, or remove "
            "the key"
        )


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """Gather all weights of a sharded model on the main process, by name; return None if the model is not sharded.

    Call it on every process after the training: with FSDP or ZeRO-3 each holds a shard. Models that are loaded later
    are not sharded.
    """
    accelerator = trainer.accelerator
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and (
        accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    if not zero3 and accelerator.distributed_type != DistributedType.FSDP:
        return None
    weights = accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()  # else transformers would shard them while they are loaded
    return weights


def restore_settings(saved: PretrainedConfig, base: PretrainedConfig) -> None:
    """Give a model the settings of its base that training changes: of a router, for TRL's loss, and of the cache."""
    before = base.get_text_config().to_dict()
    for key in CHANGED_KEYS:
        if key in before:
            setattr(saved.get_text_config(), key, before[key])


def save_plain_model(trainer: Trainer, base: Path | str, config: ModelConfig, directory: Path) -> None:
    """Save plain weights, an adapter merged into `base`, and what makes the model's inputs.

    Call it on every rank: with FSDP or ZeRO-3 each rank holds a shard.
    """
    model, weights = trainer.accelerator.unwrap_model(trainer.model), whole_weights(trainer)
    if trainer.is_world_process_zero():
        if isinstance(model, PeftModel):
            model, weights = merged(model, base, config, weights), None
        restore_settings(model.config, load_config(base, config))
        model.save_pretrained(directory, state_dict=weights)
        save_processor(trainer.processing_class, model.config, directory)
    trainer.accelerator.wait_for_everyone()
