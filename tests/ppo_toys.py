"""Settings, rewards and readers that the tests of PPOTrainer share."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pipeline.rewards import RewardConfig
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

COLOURS = ("red", "blue", "green", "white", "black")
NUMBERS = ("one", "two", "three", "four", "five")
SMALL: dict[str, Any] = {
    "rewards": (RewardConfig("constant"),),
    "total_episodes": 24,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 2,
    "learning_rate": 5e-3,
    "response_length": 4,
    "num_sample_generations": 0,
    "bf16": False,
    # Scores are what the rewards say, and the loss that of the papers.
    "score_scaling": "none",
    "missing_eos_penalty": None,
    "dual_clip": None,
    "value_learning_rate": 5e-3,
    "adam_epsilon": 1e-5,
}


def small(**settings: Any) -> PPOConfig:
    """`SMALL` with some settings, and without the value function's learning rate where there is none."""
    merged = {**SMALL, **settings}
    without = PPOConfig(**{**merged, "value_learning_rate": None})
    return PPOConfig(**merged) if without.value_loss_weight else without


def colours(prompts: list, completions: list, **columns: list) -> list[float]:
    """The share of colours among the colours and numbers of a completion, 0 where it has neither."""
    scores = []
    for completion in completions:
        words = [word for word in completion.split() if word in COLOURS + NUMBERS]
        scores.append(sum(word in COLOURS for word in words) / max(1, len(words)))
    return scores


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def training_steps(directory: Path) -> list[dict[str, float]]:
    """The lines of PPO steps, without those of evaluations."""
    return [line for line in read_metrics(directory) if "objective/kl" in line]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The weights and moments in a checkpoint of one process."""
    (shard,) = checkpoint.glob("shard-*.safetensors")
    return load_file(shard)


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Everything that is trained."""
    return trainer.shared.trainable_state()
