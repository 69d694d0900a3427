"""Going on with another number of processes, and beginning anew from the weights of an incomplete checkpoint."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from ppo_toys import training_steps, weights
from safetensors.torch import load_file
from two_processes import run_in_two

from pipeline.models.loading import lora_config
from pipeline.trainers.checkpoints import list_checkpoints
from pipeline.trainers.huggingface.sft import build_sft_trainer, last_checkpoint, sft_arguments
from pipeline.trainers.weights_alone import VARIABLE

SETTINGS = {"gradient_accumulation_steps": 1, "save_steps": 1, "total_episodes": 40, "save_total_limit": 9}


def test_ppo_goes_on_in_other_numbers_of_processes(make_trainer, tmp_path, fresh_accelerate, capfd):
    """40 episodes: 3 steps of 4 alone, 2 steps of 8 in two, 3 of 4 alone again; every episode once."""
    rows: dict[str, list[int]] = {}

    def run(steps: int) -> None:
        trainer = make_trainer(**SETTINGS)
        rank, seen = trainer.accelerator.process_index, []
        collect, end = trainer.collect_rollout, trainer._end_step
        trainer.collect_rollout = lambda chosen: seen.extend(chosen) or collect(chosen)

        def ending(rollout, stats):
            end(rollout, stats)
            if trainer.state.step == steps:
                raise InterruptedError

        trainer._end_step = ending
        with suppress(InterruptedError):
            trainer.train()
        torch.save(weights(trainer), tmp_path / f"weights-{rank}.pt")
        (tmp_path / f"rows-{steps}-{rank}.json").write_text(json.dumps(seen))

    def forget() -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    run(3)
    forget()
    run_in_two(lambda: run(5), tmp_path)
    forget()
    said = capfd.readouterr().err
    assert (
        "which 1 processes made; this run has 2, so from episode 12 on batches, samples and learning rates are "
        in said
    )
    assert "the curve will not be identical" in said
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    run(99)
    assert "which 2 processes made; this run has 1, so from episode 28 on" in capfd.readouterr().err
    lines = training_steps(tmp_path / "ppo")
    assert [(line["step"], line["episode"]) for line in lines] == [
        (1, 4), (2, 8), (3, 12), (4, 20), (5, 28), (6, 32), (7, 36), (8, 40)
    ]  # fmt: skip
    assert lines[-1]["lr"] == pytest.approx(0.0, abs=1e-12)  # the schedule ends with the run
    assert all(line["lr"] > 0 for line in lines[:-1])
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rows-*.json"))]
    answered = [row for part in rows for row in part]
    assert len(answered) == 40 and len(set(answered)) == 40  # of 64 rows none twice before all have been seen


@pytest.fixture
def sft(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate):
    """Each call trains SFT in a directory or goes on there; its trainer."""

    def train(output: str, peft: bool):
        settings = {"max_length": 64, "num_train_epochs": 2, "learning_rate": 1e-2, "disable_tqdm": True}
        arguments = sft_arguments(settings, tmp_path / output, 0)
        trainer = build_sft_trainer(
            taught(), arguments, tokenizer, examples.select(range(16)), examples.select(range(4)),
            lora_config(model_config) if peft else None, tmp_path / output / "metrics.jsonl",
        )  # fmt: skip
        started = {}

        def first(model, inputs, **options):
            started.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            trainer.compute_loss = compute_loss
            return compute_loss(model, inputs, **options)

        compute_loss, trainer.compute_loss = trainer.compute_loss, first
        trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
        return started

    return train


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["ppo", "sft", "sft in full"])
def test_weights_alone(make_trainer, sft, tmp_path, monkeypatch, capfd, kind):
    started: dict[str, torch.Tensor] = {}

    def train() -> None:
        if kind == "ppo":
            trainer = make_trainer("run", save_steps=1)
            collect = trainer.collect_rollout

            def collecting(rows):
                if not started:
                    started.update(weights(trainer))
                return collect(rows)

            trainer.collect_rollout = collecting
            trainer.train()
        else:
            started.update(sft("run", kind == "sft"))

    train()
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (last / "optimizer.pt").unlink()
    lost = {"ppo": ["random_state.pt", "trainer_state.json"], "sft": ["loop_state.pt", "trainer_state.json"]}[kind[:3]]
    for name in lost:
        (last / name).unlink()
    before = snapshot(last.parent)
    with pytest.raises(
        ValueError, match=rf"lacks .*optimizer\.pt.*{lost[1]}.*{VARIABLE}=1 begins anew from its weights"
    ):
        train()
    monkeypatch.setenv(VARIABLE, "1")
    started.clear()
    capfd.readouterr()
    train()
    said = capfd.readouterr().err
    aside = tmp_path / "run" / "checkpoints.before-1"
    assert f"{last} lacks " in said and f"beginning at step 0 with its weights alone ({VARIABLE})" in said
    assert "continuing from" not in said
    kept = snapshot(aside)
    assert kept.pop("metrics.jsonl") == log and kept == before  # nothing is lost
    saved = load_file(next((aside / last.name).glob("*.safetensors")))
    for name, tensor in started.items():
        short = name.replace(".default", "") if kind == "sft" else name
        if short in saved:
            assert torch.equal(saved[short], tensor), name
    assert len(saved) >= 4 and sum(name.replace(".default", "") in saved or name in saved for name in started) >= 4
    again = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert again[-1].name == last.name
    train()  # nothing is missing any more: an ordinary restart, whatever is set
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == again
    assert not (tmp_path / "run" / "checkpoints.before-2").exists()


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_weights_that_are_not_whole_are_refused(make_trainer, monkeypatch, harm):
    trainer = make_trainer(save_steps=1)
    trainer.train()
    last = list_checkpoints(trainer.checkpoints)[-1]
    (last / "optimizer.pt").unlink()
    if harm == "lost":
        (last / "trainable.safetensors").unlink()
    else:
        os.truncate(last / "trainable.safetensors", 100)
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(
        ValueError, match=rf"^{VARIABLE}: the weights of checkpoint .* are not whole: trainable\.safet"
    ):
        make_trainer(save_steps=1).train()
    assert last.is_dir()
