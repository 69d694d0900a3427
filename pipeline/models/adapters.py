"""Which weights a LoRA adapter adds to, and where it may not sit: on weights that the model uses twice."""

from dataclasses import replace

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

DECODER_LINEAR = "decoder-linear"  # of lora_target_modules, beside peft's all-linear


def adapter_config(model: PreTrainedModel, lora: LoraConfig) -> LoraConfig:
    """`lora` for this model: its kind of task, and `decoder-linear` as the decoder's dense layers by name.

    Raises:
        ValueError: `decoder-linear` and a causal model.
    """
    if not model.config.is_encoder_decoder:
        if lora.target_modules == DECODER_LINEAR:
            raise ValueError(
                f"model.lora_target_modules: {DECODER_LINEAR!r} is for encoder-decoders, and this "
                f"{model.config.model_type} has no encoder; use all-linear"
            )
        return replace(lora, task_type="CAUSAL_LM")
    targets = lora.target_modules
    if targets == DECODER_LINEAR:
        inside = set(model.get_decoder().modules())
        targets = [n for n, m in model.named_modules() if m in inside and isinstance(m, nn.Linear)]
    return replace(lora, task_type="SEQ_2_SEQ_LM", target_modules=targets)


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter on an embedding that is also the LM head, or the other side's embedding.

    The adapter changes one of the two uses; merged into the shared weights it changes both, so the saved policy would
    not be the one that was trained.

    Raises:
        ValueError: naming the module and what to do.
    """
    network = model.get_base_model()
    users: dict[int, list[str]] = {}
    for name, module in network.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, nn.Embedding | nn.Linear) and not name.endswith(".base_layer"):
            users.setdefault(id(base.weight), []).append(name)
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer) and len(users.get(id(module.get_base_layer().weight), [])) > 1:
            raise ValueError(
                f"model.lora_target_modules: {name.rpartition('.')[2]!r} of this {network.config.model_type} shares "
                "its weights between input embedding and LM head (tie_word_embeddings), so that an adapter on it "
                "cannot be merged; leave it out, or train a copy of it with lora_modules_to_save"
            )
