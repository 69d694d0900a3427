"""What a pass under autocast keeps beside the weights: the bytes that docs/scaling.md counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from pipeline.models.kernels.decode_loop import cache_argument

WIDTH, FEED, LAYERS = 64, 172, 3


def adapter_over(dtype: torch.dtype):
    """LoRA on all dense layers of a Llama, and the weights in them."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": FEED, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **sizes)).to(dtype)
    weights = [p for p in model.base_model.layers.parameters() if p.dim() == 2]
    network = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    return network, weights


def copies_kept(dtype: torch.dtype, checkpointing: bool) -> int:
    """Count the bytes of other tensors, shaped like weights, that a forward pass saves for the backward pass."""
    network, weights = adapter_over(dtype)
    if checkpointing:
        network.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    shapes = {size for weight in weights for size in (tuple(weight.shape), tuple(weight.shape)[::-1])}
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) in shapes and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = network.train()(input_ids=torch.arange(7).unsqueeze(0))
    assert output.logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_float32_base_is_held_a_second_time_in_bf16(checkpointing):
    """Two bytes for each weight whose input has a gradient: all but queries, keys and values of the first layer."""
    weights = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * FEED) - 3 * WIDTH**2
    assert copies_kept(torch.float32, checkpointing) == (0 if checkpointing else 2 * weights)
    assert copies_kept(torch.bfloat16, checkpointing) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_have_the_type_of_the_base(dtype):
    """Positions are multiplied in, in the type of the states, which are those of the embeddings."""
    network, _ = adapter_over(dtype)
    cache, name = DynamicCache(), cache_argument(network.get_base_model())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(input_ids=torch.arange(7).unsqueeze(0), use_cache=True, **{name: cache})
    assert cache.layers[0].keys.dtype == dtype
