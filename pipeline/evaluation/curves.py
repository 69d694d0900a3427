"""The course of training from metrics.jsonl and timing.jsonl, and what each stage took from its stage.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.evaluation.config import BASELINES
from pipeline.evaluation.report import StageCost

# Panel -> logged names, for each stage; a name that was not logged is omitted.
PANELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sft": {
        "loss": ("loss", "eval_loss"),
        "token accuracy": ("mean_token_accuracy", "eval_mean_token_accuracy"),
        "gradient norm": ("grad_norm",),
        "learning rate": ("learning_rate",),
        "tokens/s": ("tokens_per_second",),
    },
    "reward": {
        "loss": ("loss", "eval_loss"),
        "accuracy": ("accuracy", "eval_accuracy"),
        "margin of scores": ("margin", "eval_margin"),
        "mean score": ("mean_reward", "eval_mean_reward"),
        "gradient norm": ("grad_norm",),
        "learning rate": ("learning_rate",),
    },
    "ppo": {
        "held-out reward": ("eval_reward",),
        "score of samples, after scaling": ("objective/scores",),
        "KL to SFT, nats/completion": ("objective/kl",),
        "length, tokens": ("objective/length", "eval_length"),
        "entropy, nats/completion": ("objective/entropy",),
        "policy loss": ("loss/policy_avg",),
        "value loss": ("loss/value_avg",),
        "value: explained variance": ("val/explained_variance",),
        "clipped share": ("policy/clipfrac_avg",),
        "gradient norm": ("policy/grad_norm",),
        "learning rate": ("lr",),
        "tokens/s": ("tokens_per_second",),
    },
}
SPEED = "tokens_per_second"
SEEN = "num_input_tokens_seen"


@dataclass(frozen=True)
class Curve:
    """One logged quantity: `values` at the optimizer or PPO `steps`."""

    name: str
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """Curves of one stage that share an axis."""

    stage: str
    title: str
    curves: list[Curve]


def read_panels(run: Path, wanted: Mapping[str, Mapping[str, tuple[str, ...]]] = PANELS) -> list[Panel]:
    """Read the panels of every stage of a run directory that has a metrics.jsonl."""
    panels = []
    for stage, titles in wanted.items():
        events = read_events(run / stage / "metrics.jsonl")
        speeds = token_speeds(stage, events, read_events(run / stage / "timing.jsonl"))
        for title, names in titles.items():
            curves = [speeds if name == SPEED else _curve(events, name) for name in names]
            curves = [curve for curve in curves if len(curve.steps) > 1]
            if curves:
                panels.append(Panel(stage, title, curves))
    return panels


def read_events(file: Path) -> list[dict[str, object]]:
    """Read the JSON lines of a log; an empty list without a file. A last line that was cut short is omitted."""
    if not file.is_file():
        return []
    events = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return [event for event in events if isinstance(event, dict) and "step" in event]


def _curve(events: Sequence[Mapping[str, object]], name: str) -> Curve:
    points = [(e["step"], e[name]) for e in events if isinstance(e.get(name), int | float)]
    return Curve(name, [float(step) for step, _ in points], [float(value) for _, value in points])


def tokens_by_step(stage: str, events: Sequence[Mapping[str, object]]) -> dict[int, float]:
    """Count the tokens a stage had trained on (sft, reward) or sampled (ppo) by each logged step."""
    if stage in ("sft", *BASELINES):
        return {int(e["step"]): float(e[SEEN]) for e in events if isinstance(e.get(SEEN), int | float)}
    if stage == "reward":
        return {int(e["step"]): float(e["num_tokens"]) for e in events if isinstance(e.get("num_tokens"), int | float)}
    tokens, total, before = {}, 0.0, 0
    for event in events:
        if isinstance(event.get("objective/length"), int | float) and "episode" in event:
            total += float(event["objective/length"]) * (int(event["episode"]) - before)
            before = int(event["episode"])
            tokens[int(event["step"])] = total
    return tokens


def token_speeds(stage: str, events: Sequence[Mapping[str, object]], timing: Sequence[Mapping[str, object]]) -> Curve:
    """Compute tokens per second between logged steps of one process; a resumed process starts its clock anew."""
    tokens = tokens_by_step(stage, events)
    points = [(int(e["step"]), float(e["seconds"])) for e in timing if int(e["step"]) in tokens]
    steps, values = [], []
    for (step, start), (later, end) in pairwise(points):
        if end > start and later > step:
            steps.append(float(later))
            values.append((tokens[later] - tokens[step]) / (end - start))
    return Curve(SPEED, steps, values)


def read_cost(run: Path, stages: Sequence[str]) -> list[StageCost]:
    """Read the cost of every finished stage of a run directory."""
    costs = []
    for stage in stages:
        file = run / stage / "stage.json"
        if not file.is_file():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        tokens = record.get("tokens")
        if tokens is None:
            by_step = tokens_by_step(stage, read_events(run / stage / "metrics.jsonl"))
            tokens = round(max(by_step.values())) if by_step else None
        seconds = record.get("seconds")
        costs.append(
            StageCost(
                stage=stage,
                seconds=seconds,
                processes=record.get("processes"),
                steps=record.get("steps"),
                episodes=record.get("episodes"),
                tokens=tokens,
                tokens_per_second=tokens / seconds if tokens and seconds else None,
                peak_memory_mib=record.get("peak_memory_mib"),
            )
        )
    return costs
