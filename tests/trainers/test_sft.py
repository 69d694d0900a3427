"""Supervised fine-tuning: labels, the loss against TRL's own, restarts, and what is saved."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import PeftModel
from transformers import (
    Gemma3Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    T5Config,
    WhisperConfig,
)
from trl import SFTTrainer
from two_processes import run_in_two

from pipeline.models.loading import load_model, load_tokenizer, lora_config
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.trainers.huggingface.arguments import uses_all_weights
from pipeline.trainers.huggingface.completion_head import CompletionHeadSFTTrainer
from pipeline.trainers.huggingface.gather_weights import check_sharding
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments, sft_dataset

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
def make_trainer(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate):
    """Each call builds a trainer over the first 24 examples; keywords of SFTConfig change `SETTINGS`."""

    def make(output: str = "sft", peft: bool = True, seed: int = 0, **settings) -> SFTTrainer:
        return build_sft_trainer(
            taught(),
            sft_arguments({**SETTINGS, **settings}, tmp_path / output, seed),
            tokenizer,
            examples.select(range(24)),
            examples.select(range(24, 32)),
            lora_config(model_config) if peft else None,
            tmp_path / output / "metrics.jsonl",
        )

    return make


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_two_processes_do_not_search_for_unused_weights(make_trainer, tmp_path, capfd, peft):
    def train() -> None:
        trainer = make_trainer(peft=peft, gradient_checkpointing=False, max_steps=1)
        trainer.train()
        assert trainer.accelerator.num_processes == 2

    run_in_two(train, tmp_path)
    assert "find_unused_parameters" not in capfd.readouterr().err  # torch warns of a search that finds none


def test_weights_that_not_every_pass_reads_are_known_by_the_configuration():
    assert all(uses_all_weights(config) for config in (LlamaConfig(), T5Config(), WhisperConfig(), GPTNeoXConfig()))
    may_leave_out = (MixtralConfig(), Qwen3MoeConfig(), WhisperConfig(encoder_layerdrop=0.1), Gemma3Config())
    assert not any(uses_all_weights(config) for config in may_leave_out)
    assert not uses_all_weights(LlamaConfig(auto_map={"AutoModelForCausalLM": "code.Model"}))


def read_metrics(trainer: SFTTrainer) -> list[dict]:
    file = trainer.args.output_dir.removesuffix("checkpoints") + "metrics.jsonl"
    with open(file) as lines:
        return [json.loads(line) for line in lines]


def a_batch(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def test_labels_are_the_completion_alone(tokenizer, examples):
    rows = sft_dataset(tokenizer, examples)
    prompts = encode_prompts(tokenizer, examples["prompt"])
    answers = encode_completions(tokenizer, examples["prompt"], examples["completion"])
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        assert row["input_ids"] == prompt + answer  # tokenised apart, as PPO will see them
        assert row["labels"] == [-100] * len(prompt) + answer
        assert answer[-1] == tokenizer.eos_token_id
        assert row["length"] == len(prompt) + len(answer)
    whole = sft_dataset(tokenizer, examples, completion_only_loss=False)
    assert whole["labels"] == whole["input_ids"] == rows["input_ids"]


def test_tokenised_examples_are_kept_in_a_cache(tokenizer, base_directory, model_config, examples, tmp_path):
    examples.to_json(tmp_path / "rows.jsonl")

    def cache_files(tokenizer, **settings) -> list[str]:
        rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path), split="train")
        return [file["filename"] for file in sft_dataset(tokenizer, rows, **settings).cache_files]

    first = cache_files(tokenizer)
    assert first and first == cache_files(tokenizer) == cache_files(load_tokenizer(base_directory, model_config))
    assert first != cache_files(tokenizer, completion_only_loss=False)
    tokenizer.add_tokens(["north"])
    assert first != cache_files(tokenizer)


def test_only_files_have_a_cache_to_wait_for(tokenizer, examples, tmp_path, monkeypatch):
    entered = []
    monkeypatch.setattr(PartialState, "local_main_process_first", lambda state: nullcontext(entered.append(state)))
    in_memory = sft_dataset(tokenizer, examples)
    assert not in_memory.cache_files and not entered
    examples.to_json(tmp_path / "rows.jsonl")
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path), split="train")
    assert list(sft_dataset(tokenizer, rows)["labels"]) == list(in_memory["labels"]) and len(entered) == 1


def test_the_seed_alone_draws_the_adapter(make_trainer):
    def drawn(seed: int) -> torch.Tensor:
        torch.rand(3)  # whatever came before
        weights = dict(make_trainer(seed=seed).model.named_parameters())
        return next(weight.detach() for name, weight in weights.items() if "lora_A" in name)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_sharding_that_could_not_load_or_save_is_refused(tmp_path, monkeypatch):
    """With the plugin that transformers makes of DeepSpeed's settings reduced to these."""

    def check(stage: int, gathers: bool, in_4_bits: bool) -> None:
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
        arguments = sft_arguments({}, tmp_path, seed=0)
        arguments.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
        check_sharding(arguments, in_4_bits)

    check(3, True, False)
    check(2, False, True)
    with pytest.raises(ValueError, match="without zero3_save_16bit_model: true"):
        check(3, False, False)
    with pytest.raises(ValueError, match=r"model\.load_in_4bit: weights in 4 bits are not sharded"):
        check(3, True, True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = sft_arguments({}, tmp_path, seed=0)
    check_sharding(arguments, False)
    with pytest.raises(ValueError, match=r"model\.load_in_4bit"):
        check_sharding(arguments, True)


def test_labels_survive_the_collator(make_trainer):
    trainer = make_trainer()
    batch = a_batch(trainer)
    for row, ids, labels, mask in zip(
        trainer.train_dataset, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=False
    ):
        length = len(row["input_ids"])
        assert ids[mask.bool()].tolist() == row["input_ids"]
        assert labels[mask.bool()].tolist() == row["labels"]
        assert (labels[~mask.bool()] == -100).all() and mask.sum() == length


@pytest.mark.parametrize("key", [True, False])
def test_completion_only_loss_reaches_the_labels(make_trainer, key):
    labels = make_trainer(completion_only_loss=key).train_dataset["labels"]
    assert all((row[0] == -100) == key for row in labels)


@torch.no_grad()
def direct_loss(model, batch, smoothing: float) -> torch.Tensor:
    """Mean cross-entropy by torch over the model's own full logits."""
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=smoothing)


def loss_and_gradients(trainer: SFTTrainer, batch, **options):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), **options)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def without_dropout(trainer: SFTTrainer) -> SFTTrainer:
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_trl(make_trainer, monkeypatch, taught, peft, smoothing):
    ours = without_dropout(make_trainer("ours", peft=peft, label_smoothing_factor=smoothing))
    assert type(ours) is CompletionHeadSFTTrainer
    monkeypatch.setattr("pipeline.trainers.huggingface.sft.CompletionHeadSFTTrainer", SFTTrainer)
    theirs = without_dropout(make_trainer("theirs", peft=peft, label_smoothing_factor=smoothing))
    assert type(theirs) is SFTTrainer
    batch = a_batch(ours)
    scored = int((batch["labels"][:, 1:] != -100).sum())
    reference = float(direct_loss(taught(), batch, smoothing))
    for count in (None, 100):
        options = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
        loss, gradients = loss_and_gradients(ours, batch, **options)
        expected, expected_gradients = loss_and_gradients(theirs, batch, **options)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
        assert loss.item() == pytest.approx(reference * scored / (count or scored), abs=1e-5)
        assert any(gradient.any() for gradient in gradients.values())


def test_the_head_runs_on_scored_tokens_alone(make_trainer):
    trainer = make_trainer(peft=False)
    batch, rows = a_batch(trainer), []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape))
    trainer.compute_loss(trainer.model, dict(batch))
    assert [tuple(shape) for shape in rows] == [(int((batch["labels"][:, 1:] != -100).sum()), 309)]
    trainer.model(input_ids=batch["input_ids"])  # and the hook is gone
    assert rows[1][:2] == batch["input_ids"].shape


def test_accuracy_is_measured(make_trainer):
    trainer = make_trainer(peft=False)
    batch = a_batch(trainer)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(batch))
    predicted = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    scored = batch["labels"][:, 1:] != -100
    right = (predicted[:, :-1] == batch["labels"][:, 1:])[scored].float().mean().item()
    assert trainer._metrics["eval"]["mean_token_accuracy"] == [pytest.approx(right)]


def final_weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_accumulation_changes_nothing(make_trainer):
    settings = {
        "peft": False,
        "max_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    settings |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    whole = final_weights(make_trainer("whole", per_device_train_batch_size=8, **settings))
    parts = final_weights(
        make_trainer("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_training_lowers_the_loss_and_the_model_loads_back(
    make_trainer, base_directory, model_config, tokenizer, peft, tmp_path, examples
):
    trainer = make_trainer(peft=peft)
    before = trainer.evaluate()["eval_loss"]
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable) == peft
    trainer.train()
    lines = read_metrics(trainer)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    first, *_, last = (line["loss"] for line in lines if "loss" in line)
    assert last < first and before > 0
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=ids).logits
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        model.save_pretrained(tmp_path / "merged")
        loaded = load_model(tmp_path / "merged", model_config).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in loaded.state_dict())


def test_a_new_run_starts_a_new_file(make_trainer):
    make_trainer(max_steps=1).train()
    second = make_trainer(max_steps=1)
    second.train()
    assert [line["step"] for line in read_metrics(second)].count(1) == len(read_metrics(second))
    assert len([line for line in read_metrics(second) if "loss" in line]) == 1


def test_arguments_fit_the_machine(tmp_path):
    arguments = sft_arguments({}, tmp_path, seed=5)
    assert not arguments.bf16 and arguments.use_cpu and arguments.seed == 5
    assert arguments.eval_strategy == "epoch" and arguments.load_best_model_at_end
    assert arguments.report_to == []
    quiet = sft_arguments({"eval_strategy": "no"}, tmp_path, seed=0)
    assert not quiet.load_best_model_at_end


def test_the_best_model_is_loaded_at_the_end(make_trainer):
    trainer = make_trainer(learning_rate=1.0, num_train_epochs=3)  # falls apart: the first epoch is the best one
    trainer.train()
    losses = [line["eval_loss"] for line in read_metrics(trainer) if "eval_loss" in line]
    assert trainer.state.best_metric == pytest.approx(min(losses))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)
