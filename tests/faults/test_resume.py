"""Kill -9 at any file of any save, the same call again: weights and log come out bit for bit the same."""

import hashlib
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
from safetensors.torch import load_file

from pipeline.models.loading import lora_config
from pipeline.runtime.signals import Stopped, requested_stop, stop_signals
from pipeline.trainers.checkpoints import list_checkpoints, newest_checkpoint
from pipeline.trainers.huggingface.resumable import last_checkpoint
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments
from pipeline.trainers.logs import keep_lines

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
    "t5": (True, {**STEPS, "logging_steps": 3, "train_sampling_strategy": "group_by_length"}),
}


@pytest.fixture
def sft(taught, tokenizer, taught_t5, t5_tokenizer, examples, model_config, tmp_path, fresh_accelerate):
    """Each call trains SFT in a directory, or goes on there, and leaves its weights in `final.pt` beside it."""

    def train(output: str, peft: bool = True, before=lambda trainer: None, t5: bool = False, **settings) -> None:
        directory = tmp_path / output
        adapter = lora_config(replace(model_config, lora_dropout=0.2))
        arguments = sft_arguments({**SFT, **settings}, directory, seed=0)
        rows = examples.select(range(24)), examples.select(range(24, 32))
        trainer = build_sft_trainer(
            taught_t5() if t5 else taught(),
            arguments,
            t5_tokenizer if t5 else tokenizer,
            *rows,
            adapter if peft else None,
            directory / "metrics.jsonl",
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
def ppo(make_trainer, taught_t5, t5_tokenizer, examples, model_config, tmp_path):
    """Each call trains PPO in a directory, or goes on there, and leaves its weights in `<output>.pt`."""

    def train(output: str, before=lambda trainer: None, t5: bool = False, **settings) -> None:
        if t5:
            adapter = lora_config(replace(model_config, lora_target_modules="decoder-linear"))
            settings |= {"model": taught_t5(), "processing_class": t5_tokenizer, "peft_config": adapter}
        settings = {"total_episodes": 32, "validation": examples.select(range(4)), "eval_steps": 2, **settings}
        trainer = make_trainer(output, reward=drawing_reward, **settings)
        before(trainer)
        trainer.train(resume_from_checkpoint=True)
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
    expected["t5"] = expected["lora"]
    starts = survives_every_kill(lambda output: sft(output, peft, t5=case == "t5", **settings), tmp_path)
    assert starts == expected[case]


PPO_CASES = {"lora": {}, "full": {"use_peft": False, "save_steps": 1, "eval_steps": 3}, "t5": {"t5": True}}


@pytest.mark.parametrize("case", PPO_CASES)
def test_ppo_killed_anywhere_ends_the_same(ppo, tmp_path, case):
    starts = survives_every_kill(lambda output: ppo(output, **PPO_CASES[case]), tmp_path)
    assert starts == ([0, 1, 2, 3, 4] if case == "full" else [0, 2, 4])


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
    module = {"sft": "pipeline.trainers.huggingface.resumable", "ppo": "pipeline.trainers.ppo.trainer"}[kind]
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


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_damaged_checkpoint_costs_one_interval(sft, ppo, tmp_path, capfd, kind):
    train = {"sft": sft, "ppo": lambda output: ppo(output, save_steps=1)}[kind]
    train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    before, last = list_checkpoints(tmp_path / "broken" / "checkpoints")[-2:]
    name = {"sft": "optimizer.pt", "ppo": "shard-00001-model-00001-of-00001.safetensors"}[kind]
    os.truncate(last / name, 100)
    capfd.readouterr()
    train("broken")
    said = capfd.readouterr().err
    assert f"{last} is damaged and not used: {name} has 100 bytes instead of" in said
    assert f"continuing from {before}" in said
    assert same_weights(tmp_path / "broken.pt", tmp_path / "whole.pt")
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_what_a_checkpoint_lacks_is_listed(sft, ppo, tmp_path, kind):
    train = {"sft": sft, "ppo": ppo}[kind]
    train("run")
    names = {
        "sft": ["loop_state.pt", "optimizer.pt", "scheduler.pt"],
        "ppo": ["optimizer.json", "random_state.json", "shard-00001-model-00001-of-00001.safetensors"],
    }[kind]
    for name in names:
        (list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks {', '.join(names)}: put back what is missing"):
        train("run")


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_the_best_checkpoint_is_checked_too(sft, ppo, tmp_path, kind):
    """The first checkpoint is made the best."""
    metric = iter([0, 5, 1, 1, 1])

    def script(trainer):
        trainer.evaluator.compute_metrics = lambda completions, rows: {"scripted": next(metric)}

    train = {
        "sft": lambda: sft("run", greater_is_better=True),  # the highest loss
        "ppo": lambda: ppo("run", before=script, metric_for_best_model="eval_scripted", eval_steps=1),
    }[kind]
    train()
    first = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    weights_file = next(first.glob("*.safetensors"))
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1  # one bit
    weights_file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{first.name}' is damaged: {weights_file.name} does not have the checksum"):
        train()


@pytest.mark.parametrize("name", ["optimizer.pt", "loop_state.pt", "scheduler.pt"])
def test_a_malicious_sft_checkpoint_is_not_run(sft, tmp_path, name):
    sft("run")
    path, mark = list_checkpoints(tmp_path / "run" / "checkpoints")[-1], tmp_path / "mark"
    torch.save(Malice(mark), path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    size, digest = (path / name).stat().st_size, hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, name: {"bytes": size, "sha256": digest}}))
    with pytest.raises(ValueError, match=rf"{name}.* holds more than tensors and plain values"):
        sft("run")
    assert not mark.exists()
    assert not list(path.glob("*.bin"))  # nor do we write pickles of objects


class Malice:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("where", "message"),
    [("loss", "step 3: the loss is not finite"), ("gradient", "step 3: the gradient is not finite")],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_sft(sft, tmp_path, monkeypatch, where, message):
    settings = {**STEPS, "save_steps": 1, "eval_steps": 1}

    def spoil(trainer):
        compute_loss = trainer.compute_loss

        def spoiled(model, inputs, **options):
            loss = compute_loss(model, inputs, **options)
            if trainer.state.global_step != 2 or not model.training:
                return loss
            if where == "loss":
                return loss * float("nan")
            parameter = next(p for p in model.parameters() if p.requires_grad)
            return loss + torch.sqrt((parameter * 0).sum())  # finite, with an infinite slope

        trainer.compute_loss = spoiled

    with pytest.raises(FloatingPointError, match=rf"{message}, so no step is made and nothing saved; lower sft\."):
        sft("run", before=spoil, **settings)
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    adapter = load_file(checkpoints[-1] / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


def test_sft_weights_that_are_not_finite_are_not_saved(sft, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 1: .*lora_.* is not finite, nothing is saved"):
        sft("run", learning_rate=float("inf"), save_strategy="steps", save_steps=1, eval_strategy="no")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_disk_without_room_is_refused_before_the_first_step(sft, ppo, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))
    with pytest.raises(OSError, match=r"no room .*run/checkpoints: 4 of about [\d,]+ bytes"):
        {"sft": sft, "ppo": ppo}[kind]("run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_estimated_size_is_near_the_true_one(sft, ppo, tmp_path, monkeypatch):
    estimates = []
    monkeypatch.setattr(
        "pipeline.trainers.huggingface.resumable.check_space", lambda directory, size, count: estimates.append(size)
    )
    sft("run", peft=False, max_steps=1)
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    true = sum((path / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert 0.8 * true < estimates[0] < 1.05 * true


def test_signals_are_noted_and_the_second_ctrl_c_aborts(fresh_accelerate):
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert requested_stop() is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
