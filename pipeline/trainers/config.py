"""Name `PPOConfig` where scripts of Relay 0.1 import it from; new code imports it from `pipeline.trainers.ppo`."""

from pipeline.trainers.ppo.config import PPOConfig

__all__ = ["PPOConfig"]
