"""PPO continues with another number of processes."""

import json
from contextlib import suppress

import pytest
import torch
from ppo_toys import training_steps, weights
from two_processes import run_in_two

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
    assert "which 1 processes made; this run has 2, so from episode 12 on" in said
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
