"""Adapters that merge into what was trained, and those that could not."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.adapters import check_adapter, check_targets

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of tied weights: the subject here
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def adapted(tied: bool, **options) -> PeftModel:
    """A model with a trained adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", tie_word_embeddings=tied, **LLAMA))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def merged_difference(model: PeftModel, directory) -> float:
    """The largest difference of a logit once the adapter is merged, saved and loaded."""
    ids = torch.tensor([[5, 6, 7, 8]])
    copy.deepcopy(model).merge_and_unload().save_pretrained(directory)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
        return float((loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_embedding_is_refused(target, tmp_path):
    model = adapted(tied=True, target_modules=["q_proj", target])
    assert merged_difference(model, tmp_path) > 0.01  # what would go wrong
    with pytest.raises(ValueError, match=rf"model\.lora_target_modules: '{target}' .* cannot be merged; leave"):
        check_adapter(model)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {"target_modules": "all-linear"}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        (False, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ],
)
def test_other_adapters_are_accepted_and_merge_exactly(tied, options, tmp_path):
    model = adapted(tied, **options)
    check_adapter(model)
    assert merged_difference(model, tmp_path) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_modules_that_a_model_does_not_have_are_refused(dora):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    check_targets(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora))
    with pytest.raises(ValueError, match=r"^model\.lora_target_modules: .* this llama .*no_such.* name other layers"):
        check_targets(model, LoraConfig(r=2, target_modules=["no_such"]))
