"""Supervised fine-tuning of encoder-decoders: the model's own loss, whatever is accumulated, smoothed or forced."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from pipeline.models.loading import load_model, lora_config
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.trainers.huggingface.encoder_decoder import EncoderDecoderCollator, EncoderDecoderSFTTrainer
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

SETTINGS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "max_length": 64,
    "disable_tqdm": True,
}


@pytest.fixture
def make_sft(taught_t5, t5_tokenizer, examples, t5_config, tmp_path, fresh_accelerate):
    """Each call builds a trainer over the first 24 examples; keywords of SFTConfig change `SETTINGS`."""

    def make(output: str = "sft", peft: bool = True, model=None, **settings) -> EncoderDecoderSFTTrainer:
        return build_sft_trainer(
            model or taught_t5(),
            sft_arguments({**SETTINGS, **settings}, tmp_path / output, 0),
            t5_tokenizer,
            examples.select(range(24)),
            examples.select(range(24, 32)),
            lora_config(replace(t5_config, lora_dropout=0.0)) if peft else None,
            tmp_path / output / "metrics.jsonl",
        )

    return make


def a_batch(trainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def bart(t5_tokenizer, forced: int | None):
    """A BART whose logits have a bias, and which may force the first token."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    }
    special = {name: getattr(t5_tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    special |= {"vocab_size": len(t5_tokenizer), "decoder_start_token_id": t5_tokenizer.bos_token_id}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes, **special))
    torch.nn.init.normal_(model.final_logits_bias)
    model.generation_config.forced_bos_token_id = forced
    return model


def test_prompts_go_to_the_encoder_and_completions_to_the_decoder(make_sft, t5_tokenizer, examples):
    trainer = make_sft()
    prompts = encode_prompts(t5_tokenizer, examples["prompt"], True)
    answers = encode_completions(t5_tokenizer, examples["prompt"], examples["completion"])
    batch, end, start = a_batch(trainer), t5_tokenizer.eos_token_id, t5_tokenizer.bos_token_id
    for i in range(8):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == prompts[i]
        assert prompts[i][-1] == end and batch["attention_mask"][i, 0] == 1  # padded on the right
        labels = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert labels == answers[i] and labels[-1] == end
        assert batch["decoder_input_ids"][i][: len(labels)].tolist() == [start, *labels[:-1]]


def test_a_forced_token_is_read_and_carries_no_loss():
    rows = [{"input_ids": [5, 6], "labels": [7, 8, 2]}, {"input_ids": [5], "labels": [9, 2]}]
    batch = EncoderDecoderCollator([1, 40], 0)(rows)
    assert batch["decoder_input_ids"].tolist() == [[1, 40, 7, 8], [1, 40, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 8, 2], [-100, 9, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("kind", ["t5-lora", "t5", "bart", "bart-forced"])
def test_the_loss_is_the_models_own(make_sft, t5_tokenizer, kind):
    model = bart(t5_tokenizer, 33 if kind == "bart-forced" else None) if "bart" in kind else None
    trainer = make_sft(peft=kind == "t5-lora", model=model)
    assert type(trainer) is EncoderDecoderSFTTrainer
    batch = a_batch(trainer)
    for mode in (True, False):  # the taught T5 and this BART have no dropout
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


@torch.no_grad()
def test_smoothing_and_dft_by_direct_computation(make_sft):
    for settings in ({"label_smoothing_factor": 0.1}, {"loss_type": "dft"}):
        trainer = make_sft(peft=False, **settings)
        batch = a_batch(trainer)
        logits, labels = trainer.model.train()(**batch).logits, batch["labels"]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        if "loss_type" in settings:
            expected = (nats * (-nats).exp())[labels != -100].mean()
        else:
            expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.1)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected, rtol=1e-5, atol=1e-6)


def test_every_labelled_token_counts_once_however_it_is_accumulated(make_sft):
    settings = {"peft": False, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "optim": "sgd"}
    settings |= {"train_sampling_strategy": "sequential", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    weights = []
    for size in (8, 2):
        trainer = make_sft(
            str(size), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    assert any((weights[0][name] - before[name]).abs().max() > 1e-3 for name in before)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_training_lowers_the_loss_and_the_model_loads_back(make_sft, t5_config, tmp_path, peft):
    trainer = make_sft(peft=peft, num_train_epochs=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] and before > 0 and "eval_mean_token_accuracy" in lines[-2]
    # Tokens of prompts and completions, as for a causal model.
    assert lines[-1]["num_input_tokens_seen"] == 3 * sum(trainer.train_dataset["length"])
    batch = a_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).logits
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        model.save_pretrained(tmp_path / "merged")
        trainer.processing_class.save_pretrained(tmp_path / "merged")
        loaded = load_model(tmp_path / "merged", t5_config).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_both_sides_are_cut_to_max_length(make_sft):
    trainer = make_sft(max_length=2)
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {2}
    assert max(len(row["labels"]) for row in trainer.train_dataset) == 2
