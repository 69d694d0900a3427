"""Stages that are stopped, killed, started twice and run again: exit codes, messages, and what they leave."""

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_recipe

from pipeline import ppo as ppo_stage
from pipeline import reward as reward_stage
from pipeline import sft as sft_stage
from pipeline.stages.lock import RunInUseError, run_lock
from pipeline.trainers.checkpoints import list_checkpoints, newest_checkpoint
from pipeline.trainers.huggingface import resumable
from pipeline.trainers.huggingface.reward import ResumableRewardTrainer
from pipeline.trainers.huggingface.sft import ResumableSFTTrainer
from pipeline.trainers.ppo import trainer as ppo_trainer

STAGES = {"sft": sft_stage, "reward": reward_stage, "ppo": ppo_stage}
TRAINERS = {"sft": ResumableSFTTrainer, "reward": ResumableRewardTrainer}
SECTIONS = {
    "sft": {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    "reward": {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_checkpointing": False},
    "ppo": {"rewards": [{"name": "calling.reward"}], "total_episodes": 12, "gradient_accumulation_steps": 2},
}
REWARD = """
import os
def reward(prompts, completions, **columns):
    for _ in range(completions and len(completions) == 4 and TURNS.pop(0) or 0):
        os.kill(os.getpid(), NUMBER)
    return [len(completion) / 8 for completion in completions]
NUMBER, TURNS = 0, [0] * 100
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch, fresh_accelerate) -> str:
    """A recipe over six sentence pairs: three steps of SFT an epoch, three steps of PPO."""
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"{split} {n}\n", "chosen": "x", "rejected": "y z"} for n in range(6)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "calling.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "calling", raising=False)
    pairs = {"pairs": {"path": f"{tmp_path}/{{split}}.jsonl"}}
    return str(tiny_recipe(tmp_path, **SECTIONS | {"reward": SECTIONS["reward"] | pairs}))


def signalled(stage: str, arguments: list[str], number: int, step: int, times: int) -> int:
    """Run a stage in a child that sends itself a signal in the middle of a step; its exit code."""

    def body() -> int:
        if stage == "ppo":
            import calling

            # Rollouts alone have four completions: the first is the trial before training, which has two.
            calling.NUMBER, calling.TURNS = number, [times * (turn == step) for turn in range(1, 50)]
        else:
            step_of = TRAINERS[stage].training_step

            def training_step(trainer, *args, **kwargs):
                if trainer.state.global_step + 1 == step:
                    for _ in range(times):
                        os.kill(os.getpid(), number)
                return step_of(trainer, *args, **kwargs)

            TRAINERS[stage].training_step = training_step
        return STAGES[stage].main(arguments)

    return forks.run(body)


def result(run: Path, stage: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights a finished stage leaves, and its log."""
    files = sorted((run / stage).glob("*.safetensors"))
    weights = {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}
    return weights, (run / stage / "metrics.jsonl").read_text()


def prepare(recipe: str, stage: str, *overrides: str) -> None:
    """Run what a stage stands on."""
    if stage != "sft":
        assert sft_stage.main([recipe, *overrides]) == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_the_same_command_ends_the_same(recipe, tmp_path, capfd, stage, number):
    for name in ("whole", "broken"):
        prepare(recipe, stage, f"name={name}")
    assert STAGES[stage].main([recipe, "name=whole"]) == 0
    capfd.readouterr()
    run = tmp_path / "runs" / "broken"
    assert signalled(stage, [recipe, "name=broken"], number, step=2, times=1) == 128 + number
    said = capfd.readouterr().err
    assert f"{stage}: stopped by {number.name} after the checkpoint of step 2" in said
    assert "stopping after this step and a checkpoint" in said and "Traceback" not in said
    assert list_checkpoints(run / stage / "checkpoints")[-1].name == "checkpoint-2"
    assert not (run / stage / "stage.json").exists()
    assert STAGES[stage].main([recipe, "name=broken"]) == 0
    said = capfd.readouterr().err
    assert "continuing from" in said and "did not end well" not in said
    (weights, log), (expected, expected_log) = (result(tmp_path / "runs" / n, stage) for n in ("broken", "whole"))
    assert log == expected_log
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_the_middle_of_a_step_the_same_command_ends_the_same(recipe, tmp_path, capfd, stage):
    options = [f"{stage}.save_strategy=steps", f"{stage}.save_steps=1", f"{stage}.eval_strategy=no"]
    options = ["ppo.save_steps=1"] if stage == "ppo" else options
    for name in ("whole", "broken"):
        prepare(recipe, stage, f"name={name}")
    assert STAGES[stage].main([recipe, "name=whole", *options]) == 0
    assert signalled(stage, [recipe, "name=broken", *options], signal.SIGKILL, step=3, times=1) == -signal.SIGKILL
    run = tmp_path / "runs" / "broken"
    assert list_checkpoints(run / stage / "checkpoints")[-1].name == "checkpoint-2"
    capfd.readouterr()
    assert STAGES[stage].main([recipe, "name=broken", *options]) == 0
    said = capfd.readouterr().err
    assert "did not end well; going on from what it left" in said and "continuing from" in said
    (weights, log), (expected, expected_log) = (result(tmp_path / "runs" / n, stage) for n in ("broken", "whole"))
    assert log == expected_log
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def fill(disk: Path) -> None:
    """Leave no byte."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_disk_that_fills_up_ends_the_stage_and_costs_nothing(recipe, small_disk, capfd, monkeypatch, stage):
    """With a limit of one checkpoint: the old one stays until there is another."""
    options = [f"output_dir={small_disk}", f"{stage}.save_total_limit=1"]
    options += ["ppo.save_steps=1"] if stage == "ppo" else ["sft.save_strategy=steps", "sft.save_steps=1"]
    options += [] if stage == "ppo" else ["sft.eval_strategy=no"]
    prepare(recipe, stage, *options)
    trainer, name = {
        "sft": (resumable.ResumableTrainer, "_save_checkpoint"),
        "ppo": (ppo_trainer.PPOTrainer, "save_checkpoint"),
    }[stage]
    save = getattr(trainer, name)

    def saving(self, *arguments):
        if (self.state.global_step if stage == "sft" else self.state.step) == 2:
            fill(small_disk)
        save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, name, saving)
        capfd.readouterr()
        assert STAGES[stage].main([recipe, *options]) == 1
    said = capfd.readouterr().err
    checkpoints = small_disk / "tiny" / stage / "checkpoints"
    assert re.search(rf"error: {stage}: cannot write {checkpoints}/checkpoint-2: .* [\d,]+ bytes .* are free", said)
    assert "make room" in said and "Traceback" not in said
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-1"]
    assert newest_checkpoint(checkpoints) == (checkpoints / "checkpoint-1", [])
    (small_disk / "ballast").unlink()
    assert STAGES[stage].main([recipe, *options]) == 0
    assert f"continuing from {checkpoints}/checkpoint-1" in capfd.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_whose_checkpoint_lacks_files_lists_them_and_ends(recipe, tmp_path, capfd, stage):
    prepare(recipe, stage)
    assert signalled(stage, [recipe], signal.SIGTERM, step=2, times=1) == 143
    last = list_checkpoints(tmp_path / "runs" / "tiny" / stage / "checkpoints")[-1]
    name = "optimizer.json" if stage == "ppo" else "optimizer.pt"
    (last / name).unlink()
    (last / "trainer_state.json").unlink()
    capfd.readouterr()
    assert STAGES[stage].main([recipe]) == 1
    said = capfd.readouterr().err
    assert f"error: {stage}: checkpoint '{last}' lacks {name}, trainer_state.json" in said
    assert "ppo.sft_model_path" in said and "Traceback" not in said


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_second_ctrl_c_aborts_and_the_checkpoint_before_stays(recipe, tmp_path, capfd, stage):
    prepare(recipe, stage)
    options = {
        "sft": ["sft.save_strategy=steps", "sft.save_steps=1", "sft.eval_strategy=no"],
        "ppo": ["ppo.save_steps=1"],
    }
    assert signalled(stage, [recipe, *options[stage]], signal.SIGINT, step=3, times=2) == 130
    said = capfd.readouterr().err
    assert f"{stage}: ended by Ctrl-C" in said
    assert "Traceback" not in said
    found, notes = newest_checkpoint(tmp_path / "runs" / "tiny" / stage / "checkpoints")
    assert found.name == "checkpoint-2" and notes == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_finished_stage_is_left_alone(recipe, tmp_path, capfd, stage):
    prepare(recipe, stage)
    assert STAGES[stage].main([recipe]) == 0

    def state() -> dict:
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}

    before = state()
    capfd.readouterr()
    with run_lock(tmp_path / "runs" / "tiny"):  # not even the lock is needed
        before = state()
        assert STAGES[stage].main([recipe]) == 0
        assert state() == before
    assert capfd.readouterr().err == f"{stage}: already complete in {tmp_path}/runs/tiny/{stage}\n"


def test_killed_between_the_last_checkpoint_and_the_record(recipe, tmp_path):
    for name in ("whole", "broken"):
        assert sft_stage.main([recipe, f"name={name}"]) == 0
    for file in ("stage.json", "model.safetensors"):
        (tmp_path / "runs" / "broken" / "sft" / file).unlink()
    assert sft_stage.main([recipe, "name=broken"]) == 0
    (weights, log), (expected, expected_log) = (result(tmp_path / "runs" / n, "sft") for n in ("broken", "whole"))
    assert log == expected_log
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_changed_settings_are_shown_and_nothing_is_resumed(recipe, tmp_path, capfd):
    assert signalled("sft", [recipe], signal.SIGTERM, step=2, times=1) == 143
    (tmp_path / "train.de").write_text("x\ny\nz\nx y\ny z\nx z\n")
    capfd.readouterr()
    assert sft_stage.main([recipe, "sft.learning_rate=5e-3", "seed=1"]) == 0
    said = capfd.readouterr().err
    run = tmp_path / "runs" / "tiny"
    table = f"sft: changed since {run}/sft was made:\n  seed: 0 -> 1\n  sft.learning_rate: 0.01 -> 0.005\n"
    assert f"{table}  {tmp_path}/train.de: its contents changed\n" in said
    assert f"is now in {run}/sft.outdated-1" in said and "continuing from" not in said
    assert list_checkpoints(run / "sft.outdated-1" / "checkpoints")


def test_two_runs_on_one_directory(recipe, tmp_path, capfd):
    run = tmp_path / "runs" / "tiny"
    reader, writer = os.pipe()

    def hold():
        with run_lock(run):
            os.write(writer, b"held")
            signal.pause()

    child = forks.start(hold)
    os.read(reader, 4)
    assert sft_stage.main([recipe]) == 2
    said = capfd.readouterr().err
    assert f"error: sft: {run} is in use by process {child} on {os.uname().nodename} since 20" in said
    assert sorted(path.name for path in run.iterdir()) == [".lock"]
    os.kill(child, signal.SIGKILL)
    assert forks.wait(child) == -signal.SIGKILL
    assert sft_stage.main([recipe]) == 0  # stale: its holder is dead
    assert f"{run}: process {child} on {os.uname().nodename} since 20" in (said := capfd.readouterr().err)
    assert "did not end well; going on from what it left" in said


def test_a_lock_is_given_back(tmp_path):
    with run_lock(tmp_path / "new") as left:
        assert left is None
        with (
            pytest.raises(RunInUseError, match=rf"new is in use by process {os.getpid()} on "),
            run_lock(tmp_path / "new"),
        ):
            pass
    with run_lock(tmp_path / "new") as left:
        assert left is None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes(port: int, call) -> list[int]:
    """Run `call(rank)` in two processes that form a gloo group; their exit codes."""

    def process(rank: int):
        def body():
            group = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in group.items()})
            return call(rank)

        return body

    return [forks.wait(child) for child in [forks.start(process(rank)) for rank in (0, 1)]]


@pytest.mark.parametrize("stage", STAGES)
def test_processes_stop_together_and_go_on_together(recipe, tmp_path, stage):
    """Only the second one gets the signal."""
    port = free_port()
    small = "ppo.gradient_accumulation_steps=1"

    def train(name: str, step: int | None = None) -> list[int]:
        def call(rank: int) -> int:
            if rank == 1 and step is not None:
                module = ppo_trainer if stage == "ppo" else resumable
                asked, requested_stop = [], module.requested_stop

                def signal_first() -> int | None:
                    asked.append(1)
                    if len(asked) == step:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return requested_stop()

                module.requested_stop = signal_first
            return STAGES[stage].main([recipe, f"name={name}", small])

        return two_processes(port, call)

    for name in ("whole", "broken"):
        prepare(recipe, stage, f"name={name}", small)
    assert train("whole") == [0, 0]
    assert train("broken", step=1) == [143, 143]
    assert [p.name for p in list_checkpoints(tmp_path / "runs" / "broken" / stage / "checkpoints")] == ["checkpoint-1"]
    assert train("broken") == [0, 0]
    (weights, log), (expected, expected_log) = (result(tmp_path / "runs" / n, stage) for n in ("broken", "whole"))
    assert log == expected_log
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_process_that_comes_late_does_not_fall_out_of_step(recipe, tmp_path, monkeypatch):
    """The first one has written the pairs of the reward model by then."""
    small = "ppo.gradient_accumulation_steps=1"
    prepare(recipe, "reward", small)
    monkeypatch.setenv("RELAY_TIMEOUT_MINUTES", "0.2")  # or it would be waited for half an hour
    look = reward_stage.plain_model_directory

    def call(rank: int) -> int:
        def late(*arguments):
            time.sleep(3 * rank)
            return look(*arguments)

        reward_stage.plain_model_directory = late
        return reward_stage.main([recipe, small])

    assert two_processes(free_port(), call) == [0, 0]
