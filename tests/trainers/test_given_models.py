"""What a trainer is given in Python: models in every form, data with columns of any name, settings that change."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from ppo_toys import colours, weights
from transformers import AutoModelForCausalLM

from pipeline.models.loading import lora_config
from pipeline.trainers.ppo import PPOConfig, PPOTrainer
from pipeline.trainers.ppo.advantages import adapt_kl_coef

SIZES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "total_episodes": 2, "response_length": 4}


@pytest.fixture
def adapter(taught_directory, tokenizer, model_config, tmp_path):
    """The folder of an SFT adapter that changes the model."""
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(taught_directory), lora_config(model_config))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    network.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def test_the_adapter_of_a_policy_names_the_model_that_it_was_trained_over(
    adapter, taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate
):
    """A directory with an adapter is merged, and PPO's own adapter is over the result."""
    given = {"output_dir": tmp_path / "ppo", "peft_config": lora_config(model_config)}
    trainer = PPOTrainer(str(adapter), PPOConfig(**SIZES), tokenizer, colours, examples, **given)
    trainer.save_model()
    base = json.loads((tmp_path / "ppo" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((tmp_path / "ppo" / "base").absolute())
    ids = torch.tensor([[5, 6, 7]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ppo")
    expected = PeftModel.from_pretrained(taught(), adapter)(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_transformers_has_put_into_a_model_is_refused(make_trainer, adapter):
    with pytest.raises(ValueError, match=r"model: an adapter is inside it.*give the directory as a text"):
        make_trainer(model=AutoModelForCausalLM.from_pretrained(adapter))


def test_trained_weights_of_half_precision_are_refused(make_trainer, taught):
    with pytest.raises(ValueError, match=r"model: PPO would train .* in bfloat16.*dtype=torch\.float32"):
        make_trainer(model=taught().bfloat16(), use_peft=False)
    make_trainer(model=taught().bfloat16())  # an adapter alone, which is float32


def test_without_an_adapter_the_defaults_are_those_of_all_weights(
    taught, tokenizer, examples, tmp_path, fresh_accelerate
):
    trainer = PPOTrainer(taught(), PPOConfig(**SIZES), tokenizer, colours, examples, output_dir=tmp_path)
    assert not trainer.args.use_peft and trainer.args.policy_learning_rate == 1e-6
    settings = PPOConfig(**SIZES, value_model="adapter")
    with pytest.raises(ValueError, match=r"ppo\.value_model"):
        PPOTrainer(taught(), settings, tokenizer, colours, examples, output_dir=tmp_path / "other")


def test_rewards_see_what_the_policy_wrote_whatever_columns_the_data_has(make_trainer, examples):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    columns = {"prompts": ["another prompt"] * len(examples), "completions": ["another text"] * len(examples)}
    trainer = make_trainer(reward=reward, train=examples.add_column("prompts", columns["prompts"]).add_column(
        "completions", columns["completions"]))  # fmt: skip
    seen.clear()
    trainer.collect_rollout(trainer.prompt_rows(0))
    assert seen and not {"another prompt", "another text"} & {text for pair in seen for text in pair}


def test_a_run_that_goes_on_with_other_settings_has_them(make_trainer):
    settings = {"total_episodes": 16, "save_steps": 1, "lr_scheduler_type": "constant"}
    make_trainer(**settings, learning_rate=1e-3).train()
    other = make_trainer(
        **settings | {"total_episodes": 24},
        learning_rate=2e-3,
        value_learning_rate=2e-2,
        weight_decay=0.1,
        adam_epsilon=1e-4,
    )
    other.train(resume_from_checkpoint=True)
    policy, value = other.optimizer.param_groups
    assert (policy["lr"], value["lr"], policy["weight_decay"], policy["eps"]) == (2e-3, 2e-2, 0.1, 1e-4)


def test_a_trainer_that_has_trained_does_not_remove_its_checkpoints_and_train_nothing(make_trainer):
    trainer = make_trainer(save_steps=1)
    trainer.train()
    before = {name: weight.clone() for name, weight in weights(trainer).items()}
    with pytest.raises(ValueError, match=r"is at step \d+ and cannot start anew; make a new PPOTrainer"):
        trainer.train(resume_from_checkpoint=False)
    assert list(trainer.checkpoints.iterdir()) and weights(trainer).keys() == before.keys()


def test_references_hold_no_token_that_the_policy_never_writes(make_trainer, tokenizer, examples):
    [token, *_] = tokenizer(examples[0]["completion"], add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match=r"ppo\.ptx_coef: .* ppo\.suppress_tokens forbids"):
        make_trainer(ptx_coef=0.1, suppress_tokens=(token,))


def test_a_batch_of_more_episodes_than_the_horizon_changes_the_coefficient_by_a_fifth():
    assert adapt_kl_coef(0.1, 0.0, 0.2, episodes=128, horizon=10) == pytest.approx(0.08)
    assert adapt_kl_coef(0.1, 9.0, 0.2, episodes=128, horizon=10) == pytest.approx(0.12)
    assert adapt_kl_coef(0.1, 0.0, 0.2, episodes=5, horizon=10) == pytest.approx(0.09)


def test_no_tracker_may_be_asked_for_by_the_word_of_trl(make_trainer):
    assert make_trainer(report_to=("none",)).accelerator.log_with == []
