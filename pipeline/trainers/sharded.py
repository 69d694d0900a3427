"""Weights of which each process holds a part, by DeepSpeed's ZeRO-3 or FSDP, made whole again."""

from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """All weights by name, on the main process, of a model that is sharded; None where every process holds it whole.

    Every process calls it, when training has ended: models that are loaded afterwards are whole.
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
