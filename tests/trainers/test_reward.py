"""Reward modelling on TRL's trainer: it learns, resumes to the same bit, and saves the adapter and the head alone."""

import os
import signal
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from test_resume import log_of, same_weights, survives_every_kill
from transformers import Trainer
from two_processes import run_in_two

from pipeline.models.loading import lora_config
from pipeline.models.reward_model import RewardNetwork
from pipeline.models.sequences import Sequences
from pipeline.models.text import encode_completions
from pipeline.rewards.pairs import CHOICE, HELD_OUT, TRAIN, Pair
from pipeline.runtime.signals import Stopped
from pipeline.trainers.checkpoints import list_checkpoints
from pipeline.trainers.huggingface.resumable import last_checkpoint
from pipeline.trainers.huggingface.reward import PairCollator, build_reward_trainer, pair_dataset, reward_arguments

SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 2,
}
STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def make_pairs(tokenizer, rows, split: str, margin: float | None = None) -> list[Pair]:
    """Colours are better than places: the chosen text is `red red`, the rejected one `north north`."""
    prompts = list(rows["prompt"])
    sides = [encode_completions(tokenizer, prompts, [text] * len(prompts)) for text in ("red red", "north north")]
    return [
        Pair(split, row, prompt, "red red", "north north", good, bad, margin, "data")
        for row, (prompt, good, bad) in enumerate(zip(prompts, *sides, strict=True))
    ]


@pytest.fixture
def reward(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate):
    """Each call trains a reward in a directory, or goes on there, and leaves its weights in `<output>.pt`."""

    def train(output: str = "reward", margin: float | None = None, dropout: float = 0.0, **settings):
        arguments = reward_arguments({**SETTINGS, **settings}, tmp_path / output, seed=0)
        pairs = make_pairs(tokenizer, examples.select(range(12)), TRAIN, margin)
        pairs += make_pairs(tokenizer, examples.select(range(20, 26)), HELD_OUT, margin)
        adapter = lora_config(replace(model_config, lora_dropout=dropout))
        trainer = build_reward_trainer(
            taught(), arguments, tokenizer, pairs, adapter, tmp_path / output / "metrics.jsonl"
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
        torch.save(
            {k: v.detach().clone() for k, v in trainer.model.trainable_state().items()}, tmp_path / f"{output}.pt"
        )
        return trainer

    return train


def test_two_processes_do_not_search_for_unused_weights(reward, tmp_path, capfd):
    def train() -> None:
        assert reward(max_steps=2, save_strategy="no", eval_strategy="no").accelerator.num_processes == 2

    run_in_two(train, tmp_path)
    assert "find_unused_parameters" not in capfd.readouterr().err  # torch warns of a search that finds none


@pytest.mark.parametrize("is_sharded", [True, False])
def test_a_network_that_is_sharded_is_moved_in_slices_alone(reward, tmp_path, is_sharded):
    def train() -> None:
        if is_sharded:
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        moved, move = [], Trainer._move_model_to_device

        def noted(trainer, model, device) -> None:
            moved.append(model)
            move(trainer, model, device)

        Trainer._move_model_to_device = noted
        trainer = reward(max_steps=1, save_strategy="no", eval_strategy="no")
        assert bool(trainer.sharding.roots) == is_sharded and (not moved) == is_sharded

    run_in_two(train, tmp_path)


def held_out_accuracy(trainer) -> float:
    return trainer.evaluate()["eval_accuracy"]


@pytest.mark.parametrize("settings", [{}, {"optim": "adamw_torch"}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_it_learns_and_what_is_saved_scores_the_same(reward, taught, tmp_path, settings):
    trainer = reward(num_train_epochs=6, load_best_model_at_end=False, **settings)
    assert held_out_accuracy(trainer) == 1.0
    trainer.model.save_pretrained(tmp_path / "saved")
    batch = next(iter(trainer.get_eval_dataloader()))
    sequences = Sequences(*(batch.get(field.name) for field in fields(Sequences)))
    plain = RewardNetwork.load(taught(), tmp_path / "saved").eval()
    torch.testing.assert_close(trainer.model.eval().scores(sequences), plain.scores(sequences))
    assert [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1] < 0.2


def test_the_loss_is_that_of_the_formula_with_and_without_a_margin(reward, tokenizer):
    trainer = reward(max_steps=1, save_strategy="no", eval_strategy="no", margin=0.7)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    assert torch.equal(batch["margin"], torch.full((8,), 0.7))
    model = trainer.model.eval()
    chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - 0.7).mean()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    del batch["margin"]
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def test_batches_hold_the_chosen_texts_first(tokenizer, examples):
    pairs = make_pairs(tokenizer, examples.select(range(2)), TRAIN)
    batch = PairCollator(tokenizer.pad_token_id)(list(pair_dataset(tokenizer, pairs, False)))
    assert batch["prompt_ids"].shape[0] == batch["completion_ids"].shape[0] == 4 and "margin" not in batch
    texts = [
        tokenizer.decode(ids[mask])
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert [text.strip() for text in texts] == ["red red</s>"] * 2 + ["north north</s>"] * 2
    assert int(batch["attention_mask"].sum()) == int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())


@pytest.mark.parametrize("case", ["steps", "epochs with dropout"])
def test_every_kill_is_survived(reward, tmp_path, case):
    """As for SFT: from what a kill at any change on disk leaves, weights and log come out the same to the bit."""
    settings = STEPS if case == "steps" else {"dropout": 0.2, "disable_dropout": False}
    starts = survives_every_kill(lambda output: reward(output, num_train_epochs=2, **settings), tmp_path)
    assert len(set(starts)) >= 2


def test_a_signal_saves_and_the_run_ends_the_same(reward, tmp_path, monkeypatch):
    reward("whole")
    asked = []

    def stop():
        asked.append(1)
        return signal.SIGTERM if len(asked) == 2 else None

    monkeypatch.setattr("pipeline.trainers.huggingface.resumable.requested_stop", stop)
    with pytest.raises(Stopped, match="stopped by SIGTERM after the checkpoint of step 2") as stopped:
        reward("broken")
    assert stopped.value.exit_code == 143
    reward("broken")
    assert same_weights(tmp_path / "whole.pt", tmp_path / "broken.pt")
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


def test_checkpoints_hold_no_base(reward, tmp_path):
    trainer = reward()
    files = [
        file for path in list_checkpoints(tmp_path / "reward" / "checkpoints") for file in path.glob("*.safetensors")
    ]
    assert {file.name for file in files} == {"adapter_model.safetensors", "reward_head.safetensors"}
    trained = sum(p.numel() for p in trainer.model.trainable_state().values())
    newest = [file for file in files if file.parent.name == "checkpoint-9"]
    assert sum(tensor.numel() for file in newest for tensor in load_file(file).values()) == trained


def test_a_loss_that_is_not_finite_ends_it_naming_the_section(reward):
    with pytest.raises(FloatingPointError, match=r"the .* is not finite.*; lower reward\.learning_rate"):
        reward(learning_rate=1e30, max_grad_norm=0.0, adam_epsilon=1e-30)


def test_the_pairs_that_choose_the_checkpoint_are_not_those_that_judge_it(
    taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate
):
    pairs = [
        *make_pairs(tokenizer, examples.select(range(4)), TRAIN),
        *make_pairs(tokenizer, examples.select(range(4, 7)), CHOICE),
        *make_pairs(tokenizer, examples.select(range(7, 12)), HELD_OUT),
    ]
    arguments = reward_arguments({**SETTINGS, "eval_strategy": "epoch"}, tmp_path, seed=0)
    trainer = build_reward_trainer(
        taught(), arguments, tokenizer, pairs, lora_config(model_config), tmp_path / "metrics.jsonl"
    )
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (4, 3)
    without = [pair for pair in pairs if pair.split != CHOICE]
    trainer = build_reward_trainer(
        taught(), arguments, tokenizer, without, lora_config(model_config), tmp_path / "metrics.jsonl"
    )
    assert len(trainer.eval_dataset) == 5
