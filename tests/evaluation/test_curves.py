"""Curves and cost from what the stages leave."""

import json

import pytest

from pipeline.evaluation.curves import read_cost, read_panels, token_speeds, tokens_by_step


def lines(path, *events):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


PPO = [
    {"step": 0, "eval_reward": 0.5},
    {"step": 1, "episode": 8, "objective/scores": 0.1, "objective/length": 10.0, "objective/kl": None},
    {"step": 2, "episode": 16, "objective/scores": 0.2, "objective/length": 20.0, "eval_x": 1},
    {"step": 2, "eval_reward": 0.6},
]


def test_panels_hold_what_was_logged(tmp_path):
    lines(tmp_path / "ppo" / "metrics.jsonl", *PPO)
    with (tmp_path / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "obj')  # cut short by a kill
    found = {panel.title: panel for panel in read_panels(tmp_path)}
    curves = [
        curve for title, panel in found.items() if "reward" in title or "score" in title for curve in panel.curves
    ]
    assert [(c.name, c.steps, c.values) for c in curves] == [
        ("eval_reward", [0, 2], [0.5, 0.6]),
        ("objective/scores", [1, 2], [0.1, 0.2]),
    ]
    assert "KL to SFT, nats/completion" not in found and "tokens/s" not in found
    assert read_panels(tmp_path / "nothing") == []


def test_tokens_and_their_speed():
    assert tokens_by_step("ppo", PPO) == {1: 80, 2: 240}
    assert tokens_by_step("sft", [{"step": 5, "num_input_tokens_seen": 7}, {"step": 6}]) == {5: 7}
    timing = [{"step": 0, "seconds": 1.0}, {"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 6.0}]
    found = token_speeds("ppo", PPO, timing)
    assert (found.steps, found.values) == ([2], [40])
    resumed = [{"step": 1, "seconds": 9.0}, {"step": 2, "seconds": 0.5}]  # another process's clock
    assert token_speeds("ppo", PPO, resumed).values == []


def test_cost_is_that_of_the_stage_records(tmp_path):
    lines(tmp_path / "ppo" / "metrics.jsonl", *PPO)
    record = {"seconds": 120.0, "processes": 2, "steps": 2, "episodes": 16, "peak_memory_mib": 500.0}
    lines(tmp_path / "ppo" / "stage.json", record)
    (cost,) = read_cost(tmp_path, ("sft", "ppo"))
    assert (cost.stage, cost.seconds, cost.processes, cost.episodes) == ("ppo", 120.0, 2, 16)
    assert (cost.tokens, cost.tokens_per_second, cost.peak_memory_mib) == (240, pytest.approx(2.0), 500.0)
