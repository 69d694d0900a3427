"""Where a LoRA adapter may sit: not on weights that the model uses twice."""

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter on an embedding that is also the LM head.

    The adapter changes one of the two uses; merged into the shared weights it changes both, so the saved policy would
    not be the one that was trained.

    Raises:
        ValueError: naming the module and what to do.
    """
    causal_lm = model.get_base_model()
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return
    for name, module in causal_lm.named_modules():
        if module in (embedding, head) and isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"model.lora_target_modules: {name.rpartition('.')[2]!r} of this {causal_lm.config.model_type} shares "
                "its weights between input embedding and LM head (tie_word_embeddings), so that an adapter on it "
                "cannot be merged; leave it out, or train a copy of it with lora_modules_to_save"
            )
