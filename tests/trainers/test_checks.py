"""What PPOTrainer refuses in its first seconds, in one sentence that names the cause."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config

from pipeline.models.loading import position_limit
from pipeline.models.shared import SharedModel
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments
from pipeline.trainers.ppo.checks import check_prompt_ids, check_special_tokens, first_examples


def test_no_rows(make_trainer, examples):
    with pytest.raises(ValueError, match="train_dataset: it has no rows"):
        make_trainer(train=examples.select([]))


def test_prompts_that_leave_no_room_are_counted(make_trainer, examples, tokenizer):
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in examples["prompt"])
    make_trainer(response_length=64 - longest)  # exactly fits
    with pytest.raises(
        ValueError, match=r"^ppo\.response_length: \d+ of 64 prompts of train_dataset leave no room .* "
    ):
        make_trainer(response_length=65 - longest)


def test_held_out_prompts_need_room_too(make_trainer, examples):
    long = Dataset.from_list([{"prompt": "say " + "north " * 60, "references": ["x"], "tag": "x"}])
    with pytest.raises(ValueError, match=r"1 of 1 prompts of eval_dataset leave no room for 4 tokens in the 64 pos"):
        make_trainer(validation=long)


def test_rewards_are_tried_on_references_where_the_data_has_them():
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "north"}}]}]
    rows = {"prompt": ["a", "b", "c"], "completion": [call] * 3, "references": [["red", "blue"], ["one"], ["two"]]}
    assert first_examples(Dataset.from_dict(rows))["completion"] == ["red", "one"]
    given = [{"role": "assistant", "content": "red"}]
    answered = Dataset.from_dict({"prompt": ["a"], "completion": [given], "references": [[]]})
    assert first_examples(answered)["completion"] == [given]
    assert first_examples(Dataset.from_dict({"prompt": ["a"], "references": ["red"]})).get("completion") is None


def test_prompts_are_looked_at_one_by_one(taught):
    model = taught()
    with pytest.raises(ValueError, match="train_dataset: 2 of 3 prompts have no tokens, the first in row 0"):
        check_prompt_ids([[], [5], []], 4, model)
    with pytest.raises(ValueError, match=r"1 of 2 prompts have tokens beyond the model's 309 embeddings.* in row 1"):
        check_prompt_ids([[5], [6, 309]], 4, model)
    with pytest.raises(ValueError, match=r"2 of 3 prompts .* the longest with 63 tokens in row 2"):
        check_prompt_ids([[5], [6] * 61, [7] * 63], 4, model)
    check_prompt_ids([[5] * 60], 4, model)
    check_prompt_ids([], 4, model)


def test_a_model_without_a_limit_has_room_for_all(taught):
    assert position_limit(taught().config) == 64
    gpt2 = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=7)  # another name for the same
    assert position_limit(gpt2) == 7
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1))
    assert position_limit(bloom.config) is None
    check_prompt_ids([[5] * 1000], 4, bloom)


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_special_tokens_have_to_exist(taught, tokenizer, name):
    check_special_tokens(taught(), tokenizer)
    setattr(tokenizer, f"{name}_token", None)
    with pytest.raises(ValueError, match=f"has no {name} token"):
        check_special_tokens(taught(), tokenizer)


def test_special_tokens_have_to_be_known_to_the_model(make_trainer, tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(ValueError, match=r"the pad token of .* is number 309, but the model has 309 embeddings"):
        make_trainer(processing_class=tokenizer)


def test_an_adapter_that_does_not_start_at_zero_is_refused(make_trainer):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    with pytest.raises(ValueError, match=r"policy and reference differ by up to .*init_lora_weights"):
        make_trainer(peft_config=lora)


@pytest.mark.parametrize("settings", [{}, {"use_peft": False}, {"bf16": True}])
def test_noise_is_refused(make_trainer, taught, settings):
    model = taught()
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    with pytest.raises(ValueError, match=r"two passes of 'llama' .* dropout or routing noise"):
        make_trainer(model=model, **settings)


def test_a_pass_that_differs_under_gradients_is_refused(make_trainer, taught):
    model = taught()
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output.roll(int(torch.is_grad_enabled()), -1))
    with pytest.raises(ValueError, match=r"in training and in rollouts differ .*gradient_checkpointing"):
        make_trainer(model=model)


def test_broken_weights_are_refused(make_trainer, taught):
    model = taught()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="are not finite before the first step"):
        make_trainer(model=model)


def test_the_checks_leave_no_trace(make_trainer, monkeypatch):
    calls = []
    original = SharedModel.forward
    monkeypatch.setattr(
        SharedModel, "forward", lambda self, s: calls.append(torch.get_rng_state()) or original(self, s)
    )
    trainer = make_trainer()
    assert len(calls) == 3 and torch.equal(calls[0], calls[2])
    assert torch.equal(torch.get_rng_state(), calls[0])
    assert all(parameter.grad is None for parameter in trainer.shared.parameters())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_embedding_is_refused_by_both_stages(
    make_trainer, taught, tokenizer, examples, tmp_path, target
):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", target])
    with pytest.raises(ValueError, match=rf"^model\.lora_target_modules: '{target}' of this llama shares its weights"):
        make_trainer(peft_config=lora)
    arguments = sft_arguments({"max_length": 32}, tmp_path, 0)
    # TRL itself refuses the head, the rest of it is for us.
    with pytest.raises(
        ValueError, match=rf"^model\.lora_target_modules: '{target}'|adapter to `{target}` is not supported"
    ):
        build_sft_trainer(taught(), arguments, tokenizer, examples, examples, lora, tmp_path / "metrics.jsonl")
