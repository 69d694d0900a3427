"""SFT and PPO of a tiny Whisper: the model's own loss, ratio 1 and KL 0, micro-batches, resume and recomputation."""

import json
from dataclasses import replace

import pytest
import torch
from ppo_toys import SMALL, small
from pretended_gpu import pretended_gpu
from transformers import WhisperProcessor

from pipeline.metrics import load_metric
from pipeline.models.clips import feature_extractor
from pipeline.models.generation import Decoding, generate
from pipeline.models.likelihood import completion_logprobs
from pipeline.models.loading import load_model, load_policy, lora_config
from pipeline.models.prompts import encode_rows
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.speech import read_clip
from pipeline.models.states import final_states
from pipeline.models.text import encode_completions
from pipeline.rewards.metric import metric_reward
from pipeline.trainers.huggingface.encoder_decoder import SpeechCollator, SpeechSFTTrainer
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.reference_texts import encode_references
from pipeline.trainers.ppo.trainer import PPOTrainer

SFT = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "max_length": 40,
    "disable_tqdm": True,
}
SPEECH = {"response_length": 8, "num_generations": 2, "group_baseline": True}


@pytest.fixture
def make_sft(taught_whisper, whisper_tokenizer, spoken, whisper_config, tmp_path, fresh_accelerate):
    """Each call builds a trainer over the first 16 examples; keywords of SFTConfig change `SFT`."""

    def make(output: str = "sft", peft: bool = True, **settings) -> SpeechSFTTrainer:
        return build_sft_trainer(
            taught_whisper(),
            sft_arguments({**SFT, **settings}, tmp_path / output, 0),
            whisper_tokenizer,
            spoken.select(range(16)),
            spoken.select(range(16, 24)),
            lora_config(replace(whisper_config, lora_dropout=0.0)) if peft else None,
            tmp_path / output / "metrics.jsonl",
        )

    return make


@pytest.fixture
def make_ppo(taught_whisper, whisper_tokenizer, spoken, whisper_config, tmp_path, fresh_accelerate):
    """Each call builds a trainer with the word error rate as reward; keywords of PPOConfig change the settings."""

    def make(output: str = "ppo", validation=None, targets="decoder-linear", tokenizer=None, **settings) -> PPOTrainer:
        return PPOTrainer(
            model=taught_whisper(),
            args=small(**{**SPEECH, **settings}),
            processing_class=tokenizer or whisper_tokenizer,
            reward_funcs=metric_reward(load_metric("wer")),
            train_dataset=spoken,
            eval_dataset=validation,
            peft_config=lora_config(replace(whisper_config, lora_target_modules=targets)),
            output_dir=tmp_path / output,
        )

    return make


def a_batch(trainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def test_given_tokens_are_read_and_carry_no_loss(make_sft, whisper_tokenizer, spoken):
    trainer = make_sft()
    batch, prompts = a_batch(trainer), encode_rows(whisper_tokenizer, spoken)
    answers = encode_completions(whisper_tokenizer, spoken["prompt"], spoken["completion"])
    assert type(trainer) is SpeechSFTTrainer and isinstance(trainer.data_collator, SpeechCollator)
    for i in range(8):
        assert torch.equal(batch["input_features"][i], read_clip(spoken[i]["clip"]).features())
        assert batch["labels"][i, :3].tolist() == [-100] * 3
        assert batch["labels"][i][batch["labels"][i] != -100].tolist() == answers[i]
        assert answers[i][-1] == whisper_tokenizer.eos_token_id
        assert batch["decoder_input_ids"][i, : 3 + len(answers[i])].tolist() == [*prompts[i], *answers[i][:-1]]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_the_loss_is_the_models_own(make_sft, peft):
    trainer = make_sft(peft=peft)
    batch = a_batch(trainer)
    for mode in (True, False):  # this model has no dropout
        trainer.model.train(mode)
        trainer.model.zero_grad()
        expected = trainer.model(**batch).loss
        expected.backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(trainer.model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
        assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_sft_trains_counts_texts_and_the_model_loads_back(make_sft, whisper_config, tmp_path, peft):
    trainer = make_sft(peft=peft, num_train_epochs=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    labels = sum(len(row["labels"]) for row in trainer.train_dataset)
    assert lines[-1]["num_input_tokens_seen"] == 3 * labels
    assert trainer.evaluate()["eval_loss"] != before
    batch = a_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).logits
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.merge_and_unload() if peft else model
        model.save_pretrained(tmp_path / "merged")
        trainer.processing_class.save_pretrained(tmp_path / "merged")
        loaded = load_model(tmp_path / "merged", whisper_config).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_spec_augment_masks_in_sft_and_not_in_ppo(make_sft, make_ppo):
    trainer = make_sft()
    for config in (trainer.model.config, trainer.model.get_base_model().model.config):
        config.apply_spec_augment, config.mask_time_prob = True, 0.5
    batch = a_batch(trainer)
    silent = batch["input_features"].clone()
    seen = []
    trainer.model.get_encoder().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    for mode in (True, False):
        trainer.model.train(mode)
        trainer.compute_loss(trainer.model, {name: tensor.clone() for name, tensor in batch.items()})
    assert (seen[0] == 0).any() and torch.equal(seen[1], silent)
    ppo = make_ppo(targets="all-linear")
    ppo.shared.language_model.config.apply_spec_augment = True
    ppo.shared.language_model.get_encoder().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ppo.train()
    assert len(seen) > 2 and not any((features == 0).all(dim=1).any() for features in seen[2:])


def test_an_interrupted_sft_ends_with_the_same_bits(make_sft, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    settings |= {"lr_scheduler_type": "constant"}
    whole = make_sft("whole", **settings)
    whole.train()
    make_sft("part", max_steps=1, **settings).train()
    again = make_sft("part", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoints" / "checkpoint-1"))
    assert whole.state.global_step == again.state.global_step == 2
    for (name, first), (_, second) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("targets", ["decoder-linear", "all-linear"])
def test_ppo_starts_at_ratio_1_and_kl_0(make_ppo, spoken, targets):
    trainer = make_ppo(targets=targets, validation=spoken.select(range(8)))
    rollout = trainer.collect_rollout(trainer.prompt_rows(0))
    assert (rollout.sequences.sound.states is not None) == (targets == "decoder-linear")
    assert rollout.sequences.sound.features.shape[0] == len(rollout.prompts) // 2  # each clip once
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    experience, stats = trainer.compute_advantages(rollout)
    assert stats["objective/kl"] == 0
    ratios = []
    for batch in experience.micro_batches(trainer.args.per_device_train_batch_size):
        ratios.append((trainer.shared(batch.sequences).logprobs - batch.logprobs).exp()[batch.mask])
    assert torch.equal(torch.cat(ratios), torch.ones(int(experience.mask.sum())))
    written = {token for ids in rollout.sequences.completion_ids.tolist() for token in ids}
    assert not written & set(trainer.shared.language_model.generation_config.suppress_tokens)


def test_the_first_step_check_notices_a_reference_that_forbids_nothing(make_ppo, monkeypatch):
    plain = SharedModel.reference_logprobs

    def without_offsets(self, *batches):
        kept, self.logit_offset, self.first_logit_offset = (self.logit_offset, self.first_logit_offset), None, None
        try:
            return plain(self, *batches)
        finally:
            self.logit_offset, self.first_logit_offset = kept

    monkeypatch.setattr(SharedModel, "reference_logprobs", without_offsets)
    with pytest.raises(ValueError, match="policy and reference differ"):
        make_ppo()


@pytest.mark.parametrize("targets", ["decoder-linear", "all-linear"])
def test_micro_batches_do_not_change_the_update(make_ppo, targets):
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_ppo(str(size), targets=targets, total_episodes=8, **settings)
        trainer.train()
        weights.append(trainer.shared.trainable_state())
    for name, first in weights[0].items():
        torch.testing.assert_close(weights[1][name], first, rtol=1e-3, atol=1e-5)


def test_recomputation_does_not_change_the_update(make_ppo):
    weights = []
    for checkpointing in (True, False):
        trainer = make_ppo(str(checkpointing), targets="all-linear", gradient_checkpointing=checkpointing)
        trainer.train()
        weights.append(trainer.shared.trainable_state())
    for name, first in weights[0].items():
        torch.testing.assert_close(weights[1][name], first, rtol=1e-3, atol=1e-5)


def test_an_interrupted_ppo_ends_with_the_same_bits(make_ppo):
    settings = {"total_episodes": 32, "save_steps": 1}
    whole = make_ppo("whole", **settings)
    whole.train()
    part = make_ppo("part", **settings)
    step, part.advance = part.advance, lambda *given: (step(*given), part.state.step == 2 and stop())[0]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = make_ppo("part", **settings)
    again.train()
    first, second = whole.shared.trainable_state(), again.shared.trainable_state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = make_ppo("new").shared.trainable_state()
    assert any(not torch.equal(first[name], start[name]) for name in first)


def test_a_processor_serves_as_the_tokenizer_and_the_policy_loads_back(
    make_ppo, whisper_tokenizer, taught_whisper_directory, whisper_config, tmp_path
):
    processor = WhisperProcessor(
        feature_extractor(load_model(taught_whisper_directory, whisper_config).config), whisper_tokenizer
    )
    trainer = make_ppo(tokenizer=processor)
    trainer.train()
    trainer.save_model(tmp_path / "policy")
    policy = load_policy(tmp_path / "policy", taught_whisper_directory, whisper_config).eval()
    prompts = trainer.writer.encode(trainer.train_dataset)[:4]
    written = trainer.writer.write(prompts, trainer.args.greedy).ids
    assert generate(policy, whisper_tokenizer, prompts, trainer.args.greedy, 4) == written


def test_data_without_clips_are_refused_in_one_sentence(
    taught_whisper, whisper_tokenizer, spoken, tmp_path, fresh_accelerate
):
    with pytest.raises(ValueError, match=r"train_dataset: .* hears sound.*column `clip`"):
        PPOTrainer(
            model=taught_whisper(),
            processing_class=whisper_tokenizer,
            reward_funcs=metric_reward(load_metric("wer")),
            train_dataset=spoken.remove_columns("clip"),
            output_dir=tmp_path,
        )


def test_mixed_in_references_hold_nothing_forbidden(make_ppo, whisper_tokenizer, spoken, taught_whisper):
    trainer = make_ppo(ptx_coef=0.1, total_episodes=8)
    experience, _ = trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(0)))
    assert 0 < trainer.update(experience)["loss/ptx_avg"] < 20
    model = taught_whisper()
    model.generation_config.suppress_tokens = whisper_tokenizer("one", add_special_tokens=False)["input_ids"]
    prompts = encode_rows(whisper_tokenizer, spoken)
    with pytest.raises(ValueError, match=r"ppo.ptx_coef: \d+ of 24 references hold tokens that .*forbids"):
        encode_references(PPOConfig(**SMALL, ptx_coef=0.1), spoken, prompts, whisper_tokenizer, model)


def test_a_frozen_base_of_half_precision_hears_without_autocast(taught_whisper, whisper_tokenizer, spoken, make_sft):
    model = taught_whisper().to(torch.bfloat16)
    prompts = encode_rows(whisper_tokenizer, spoken.select(range(2)), True)
    for beams in (1, 2):
        assert len(generate(model, whisper_tokenizer, prompts, Decoding(4, num_beams=beams), 2)) == 2
    sequences = make_sequences(prompts, [[5, 6], [7]], 0)
    assert final_states(model, sequences).dtype == torch.bfloat16
    assert completion_logprobs(model, sequences).isfinite().all()
    trainer = make_sft(num_train_epochs=1)
    trainer.model.get_base_model().to(torch.bfloat16)
    trainer.train()


def test_clips_and_models_meet_on_one_gpu(make_sft, make_ppo, spoken):
    with pretended_gpu() as mode:
        make_sft(num_train_epochs=1).train()
        trained = mode.operations
        make_ppo(validation=spoken.select(range(4)), total_episodes=8, ptx_coef=0.1).train()
    assert mode.operations - trained > 1000 < trained
