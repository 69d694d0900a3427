"""PPO with one base model in every role."""

from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
