"""PPO from every kind of SFT output: the reference is the SFT policy, and what is saved loads over it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from ppo_toys import SMALL, colours, training_steps
from transformers import AutoModelForCausalLM

from pipeline.models.loading import load_model, load_policy, load_tokenizer, lora_config, plain_model_directory
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def sft_outputs(taught_directory, base_directory, model_config, tmp_path_factory) -> dict[str, Path]:
    """The taught model as SFT may leave it: trained in full, as an adapter, and as that adapter merged."""
    root = tmp_path_factory.mktemp("outputs")
    adapted = get_peft_model(load_model(taught_directory, model_config), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(root / "adapter")
    copy.deepcopy(adapted).merge_and_unload().save_pretrained(root / "merged")
    load_tokenizer(taught_directory, model_config).save_pretrained(root / "merged")
    return {"full": taught_directory, "adapter": root / "adapter", "merged": root / "merged"}


def own_logits(kind: str, path: Path, taught_directory) -> torch.Tensor:
    """The SFT policy by the libraries' own loaders; an adapter is not merged."""
    if kind == "adapter":
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(taught_directory), path))
    return logits(AutoModelForCausalLM.from_pretrained(path))


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_the_reference_is_the_sft_policy(
    sft_outputs, taught_directory, model_config, examples, tmp_path, fresh_accelerate, kind, use_peft
):
    path = plain_model_directory(sft_outputs[kind], model_config, tmp_path / "base")
    assert (path == sft_outputs[kind]) == (kind != "adapter")
    trainer = PPOTrainer(
        model=load_model(path, model_config),
        args=PPOConfig(**SMALL | {"total_episodes": 16, "use_peft": use_peft}),
        processing_class=load_tokenizer(path, model_config),
        reward_funcs=colours,
        train_dataset=examples,
        peft_config=lora_config(model_config),
        output_dir=tmp_path / "ppo",
    )
    expected = own_logits(kind, sft_outputs[kind], taught_directory)
    if kind != "full":
        assert (expected - own_logits("full", taught_directory, taught_directory)).abs().max() > 0.1
    trainer.train()
    first, second = training_steps(trainer.output_dir)
    assert first["objective/kl"] == 0.0 and first["val/ratio_first"] == 1.0
    assert second["objective/kl"] != 0.0 and second["val/ratio_first"] == 1.0
    with trainer.shared.reference() as reference:
        torch.testing.assert_close(logits(reference), expected, rtol=1e-5, atol=1e-5)

    trainer.save_model()
    policy = logits(trainer.shared.network)
    assert (policy - expected).abs().max() > 0.01
    evaluated = load_policy(trainer.output_dir, sft_outputs[kind], model_config)
    torch.testing.assert_close(logits(evaluated), policy, rtol=1e-4, atol=1e-4)
    loader = AutoPeftModelForCausalLM if use_peft else AutoModelForCausalLM
    torch.testing.assert_close(logits(loader.from_pretrained(trainer.output_dir)), policy, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_merged_once(sft_outputs, model_config, tmp_path, fresh_accelerate):
    target = tmp_path / "base"
    (tmp_path / "base.tmp").mkdir()  # cut off while it was written
    for _ in range(2):
        assert plain_model_directory(str(sft_outputs["adapter"]), model_config, target) == target
        before = (target / "model.safetensors").stat().st_mtime_ns
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(sft_outputs, taught_directory, model_config):
    assert not (sft_outputs["adapter"] / "tokenizer_config.json").exists()
    found = load_tokenizer(sft_outputs["adapter"], model_config)
    assert found.get_vocab() == load_tokenizer(taught_directory, model_config).get_vocab()


def test_a_prompt_tuned_model_is_refused(make_trainer, taught):
    adapted = get_peft_model(taught(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"^model: a PromptTuningConfig cannot be merged into the weights; give a "):
        make_trainer(model=adapted)


def test_the_stage_takes_an_adapter(sft_outputs, model_config, tmp_path, capsys):
    from pipeline import ppo as ppo_stage

    rows = [{"prompt": "say north", "completion": "north red", "references": ["north red"]}] * 8
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"""
name: tiny
output_dir: {tmp_path}/runs
model: {{model_name_or_path: {sft_outputs["full"]}, lora_r: 4}}
task: {{name: columns, path: "{tmp_path}/{{split}}.jsonl", prompt: "{{prompt}}", references: references}}
ppo:
  sft_model_path: {sft_outputs["adapter"]}
  rewards: [{{name: bleu}}]
  total_episodes: 8
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  response_length: 4
  learning_rate: 1e-2
eval: {{metrics: [bleu]}}
"""
    )
    assert ppo_stage.main([str(recipe)]) == 0, capsys.readouterr().err
    saved = tmp_path / "runs" / "tiny" / "ppo"
    merged = AutoPeftModelForCausalLM.from_pretrained(saved).merge_and_unload()
    evaluated = load_policy(saved, sft_outputs["adapter"], model_config)
    torch.testing.assert_close(logits(merged), logits(evaluated), rtol=1e-4, atol=1e-4)
