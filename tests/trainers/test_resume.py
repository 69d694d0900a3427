"""Kill -9 at any file of any save, the same call again: weights and log come out bit for bit the same."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from ppo_toys import colours, weights

from pipeline.models.loading import lora_config
from pipeline.trainers.checkpoint_files import list_checkpoints, newest_checkpoint
from pipeline.trainers.logs import keep_lines
from pipeline.trainers.sft import build_sft_trainer, last_checkpoint, sft_arguments
from pipeline.trainers.stopping import Stopped, stop_signals

SFT = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,  # 24 examples: 3 steps an epoch
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "bf16": False,
    "max_length": 64,
    "disable_tqdm": True,
}
STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
SFT_CASES = {
    # Saves within epochs, between log lines; dropout; an order that is drawn from the global generator.
    "lora": (True, {**STEPS, "logging_steps": 3, "train_sampling_strategy": "group_by_length"}),
    "full": (False, {"logging_steps": 2}),
    # The save of an epoch's last step has to wait for the evaluation that ends the epoch.
    "uneven": (
        True,
        {
            "save_strategy": "steps",
            "save_steps": 3,
            "eval_strategy": "epoch",
            "load_best_model_at_end": False,
            "logging_strategy": "epoch",
        },
    ),
    "max_steps": (True, {**STEPS, "max_steps": 5, "logging_steps": 1, "save_total_limit": 1}),
}


@pytest.fixture
def sft(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate):
    """Each call trains SFT in a directory, or goes on there, and leaves its weights in `final.pt` beside it."""

    def train(output: str, peft: bool = True, before=lambda trainer: None, **settings) -> None:
        directory = tmp_path / output
        adapter = lora_config(replace(model_config, lora_dropout=0.2))
        arguments = sft_arguments({**SFT, **settings}, directory, seed=0)
        rows = examples.select(range(24)), examples.select(range(24, 32))
        trainer = build_sft_trainer(
            taught(), arguments, tokenizer, *rows, adapter if peft else None, directory / "metrics.jsonl"
        )
        before(trainer)
        trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
        state = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        torch.save(state, tmp_path / f"{output}.pt")

    return train


def drawing_reward(prompts, completions, **columns):
    """Colours, with noise from each of the generators a reward function may use."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]
    return [score + n for score, n in zip(colours(prompts, completions), noise, strict=True)]


@pytest.fixture
def ppo(make_trainer, examples, tmp_path):
    """Each call trains PPO in a directory, or goes on there, and leaves its weights in `<output>.pt`."""

    def train(output: str, before=lambda trainer: None, **settings) -> None:
        settings = {"total_episodes": 32, "validation": examples.select(range(4)), "eval_steps": 2, **settings}
        trainer = make_trainer(output, reward=drawing_reward, **settings)
        before(trainer)
        trainer.train()
        torch.save(weights(trainer), tmp_path / f"{output}.pt")

    return train


def log_of(directory: Path) -> str:
    return (directory / "metrics.jsonl").read_text()


def same_weights(one: Path, other: Path) -> bool:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def survives_every_kill(train, tmp_path: Path) -> list[int]:
    """Photograph a run at each change on disk and go on from the pictures; the steps that runs went on from.

    Pictures from which a run would start alike are continued once: the checkpoint found decides, once the log, cut
    back to it, is what the whole run had written by then.
    """
    train("whole")
    watched, album = tmp_path / "watched", tmp_path / "album"
    assert forks.run(lambda: (forks.photograph(watched, album), train("watched"))) == 0
    assert log_of(watched) == log_of(tmp_path / "whole")  # and being watched changes nothing
    lines = log_of(tmp_path / "whole").splitlines(keepends=True)
    pictures, starts, last = sorted(album.iterdir()), {}, 0
    assert len(pictures) > 20
    for picture in pictures:
        shutil.copytree(picture, tmp_path / "copy")
        found, notes = newest_checkpoint(picture / "checkpoints")
        step = int(found.name.removeprefix("checkpoint-")) if found else 0
        assert notes == [] and step >= last  # what was once saved stays
        assert not list((picture / "checkpoints").glob("tmp-*"))
        log, last = picture / "metrics.jsonl", step
        if log.exists():
            keep_lines(log, step, ending="train_loss")
            so_far = [x for x in lines if step and json.loads(x)["step"] <= step and "train_loss" not in x]
            assert log.read_text() == "".join(so_far)
        shutil.rmtree(tmp_path / str(step), ignore_errors=True)
        (tmp_path / "copy").rename(tmp_path / str(step))
        starts[step] = str(step)
    for output in starts.values():
        train(output)
        assert same_weights(tmp_path / f"{output}.pt", tmp_path / "whole.pt")
        assert log_of(tmp_path / output) == log_of(tmp_path / "whole")
    return sorted(starts)


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_killed_anywhere_ends_the_same(sft, tmp_path, case):
    peft, settings = SFT_CASES[case]
    expected = {"lora": [0, 2, 4, 6, 8, 9], "full": [0, 3, 6, 9], "uneven": [0, 3, 6, 9], "max_steps": [0, 2, 4, 5]}
    assert survives_every_kill(lambda output: sft(output, peft, **settings), tmp_path) == expected[case]


@pytest.mark.parametrize("settings", [{}, {"use_peft": False, "save_steps": 1, "eval_steps": 3}], ids=["lora", "full"])
def test_ppo_killed_anywhere_ends_the_same(ppo, tmp_path, settings):
    starts = survives_every_kill(lambda output: ppo(output, **settings), tmp_path)
    assert starts == ([0, 1, 2, 3, 4] if settings else [0, 2, 4])


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_real_kill(sft, ppo, tmp_path, kind):
    train = {"sft": lambda output: sft(output, **STEPS), "ppo": lambda output: ppo(output, save_steps=1)}[kind]
    train("whole")
    for number in (25, 60):

        def killed(number=number):
            forks.kill_at(tmp_path / "broken", number)
            train("broken")

        assert forks.run(killed) == -signal.SIGKILL
        assert (tmp_path / "broken" / "checkpoints").is_dir()
    train("broken")
    assert same_weights(tmp_path / "broken.pt", tmp_path / "whole.pt")
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["sft", "ppo"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_saves_after_the_step_and_the_run_ends_the_same(sft, ppo, tmp_path, monkeypatch, kind, step):
    train = {"sft": lambda output: sft(output, logging_steps=2), "ppo": ppo}[kind]
    train("whole")
    module = {"sft": "pipeline.trainers.sft_resume", "ppo": "pipeline.trainers.ppo"}[kind]
    asked = []

    def stop_at_step():
        asked.append(1)
        return signal.SIGTERM if len(asked) == step else None

    monkeypatch.setattr(f"{module}.requested_stop", stop_at_step)
    with pytest.raises(Stopped, match=rf"stopped by SIGTERM after the checkpoint of step {step}") as stopped:
        train("broken")
    assert stopped.value.exit_code == 143
    assert list_checkpoints(tmp_path / "broken" / "checkpoints")[-1].name == f"checkpoint-{step}"
    train("broken")
    assert same_weights(tmp_path / "broken.pt", tmp_path / "whole.pt")
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


def test_signals_are_noted_and_the_second_ctrl_c_aborts(fresh_accelerate):
    from pipeline.trainers.stopping import requested_stop

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert requested_stop() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers send it again
        assert requested_stop() == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert requested_stop() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert requested_stop() is None
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
