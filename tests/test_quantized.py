"""QLoRA: every stage over a base in 4 bits, and what it saves in full precision."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from test_reward_stage import recipe  # noqa: F401 (a fixture)

from pipeline import eval as eval_stage
from pipeline import ppo as ppo_stage
from pipeline import reward as reward_stage
from pipeline import sft as sft_stage
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, lora_config, merged
from pipeline.models.shared import SharedModel
from pipeline.rewards.config import RewardConfig
from pipeline.stages import reward_inputs
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
QUANTIZED = ["model.load_in_4bit=true", "sft.use_peft=true", "sft.bf16=false", "ppo.load_best_model_at_end=false"]


def test_every_stage_over_four_bits(recipe, tmp_path, monkeypatch):  # noqa: F811
    seen = {}
    for stage, module in {"sft": sft_stage, "reward": reward_inputs, "ppo": ppo_stage}.items():

        def load(*args, stage=stage, plain=module.load_model, **kwargs):
            model = plain(*args, **kwargs)
            seen.setdefault(stage, []).append(any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules()))
            return model

        monkeypatch.setattr(module, "load_model", load)
    for module in (sft_stage, reward_stage, ppo_stage, eval_stage):
        assert module.main([recipe, *QUANTIZED]) == 0
    # The reward stage samples from the plain SFT model, and trains over four bits.
    assert seen == {"sft": [True], "reward": [False, True], "ppo": [True]}
    run = tmp_path / "runs" / "tiny"
    weights = load_file(run / "sft" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((run / "sft" / "config.json").read_text())
    base = load_file(run / "base" / "model.safetensors")
    assert any(not torch.equal(weights[name], base[name]) for name in base)
    report = json.loads((run / "eval" / "report.json").read_text())
    assert not report["systems"]["ppo"]["same_weights_as_sft"]


@pytest.fixture
def quantized(model_config) -> ModelConfig:
    return ModelConfig(**{**vars(model_config), "load_in_4bit": True})


def test_the_reference_is_the_base_in_four_bits(taught_directory, quantized, tokenizer, examples, tmp_path):
    """Before the first update the policy says what the reference says, bit for bit."""
    model = load_model(taught_directory, quantized, frozen=True)
    args = PPOConfig(
        rewards=(RewardConfig("bleu"),), total_episodes=8, per_device_train_batch_size=4, response_length=6
    )
    trainer = PPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        reward_funcs=lambda prompts, completions, **columns: [float(len(text)) for text in completions],
        train_dataset=examples,
        peft_config=lora_config(quantized),
        output_dir=tmp_path,
    )
    rollout = trainer.collect_rollout(range(4))
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    plain = load_model(taught_directory, quantized)
    full = SharedModel(plain, lora_config(quantized))(rollout.sequences).logprobs
    assert (full - rollout.logprobs).abs().max() > 1e-3  # four bits round


def test_what_is_merged_is_not_rounded(taught_directory, quantized):
    network = get_peft_model(load_model(taught_directory, quantized, frozen=True), lora_config(quantized))
    plain = load_model(taught_directory, quantized)
    same = merged(network, taught_directory, quantized)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    layer = network.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.5)
    changed = merged(network, taught_directory, quantized).model.layers[0].self_attn.q_proj.weight
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(changed, plain.model.layers[0].self_attn.q_proj.weight + update.float(), atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bnb_4bit_quant_type": "int4", "load_in_4bit": True}, "model.bnb_4bit_quant_type: 'int4' is not one of nf4"),
        ({"use_bnb_nested_quant": True}, "model.use_bnb_nested_quant: it would do nothing without model.load_in_4bit"),
    ],
)
def test_options_are_checked(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(model_name_or_path="x", **keys)


def test_without_the_library_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model.load_in_4bit: needs bitsandbytes, which is not installed"):
        ModelConfig(model_name_or_path="x", load_in_4bit=True)


def test_full_training_in_four_bits_is_refused(recipe, capsys):  # noqa: F811
    """A whole model in training has no frozen weights to hold in 4 bits."""
    with pytest.raises(SystemExit) as end:
        sft_stage.main([recipe, "model.load_in_4bit=true", "ppo.use_peft=false"])
    assert end.value.code == 2
    assert "model.load_in_4bit: PPO trains all weights (ppo.use_peft: false)" in capsys.readouterr().err
