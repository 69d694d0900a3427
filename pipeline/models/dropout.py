"""Dropout off, whatever a model calls it."""

from torch import nn


def remove_dropout(model: nn.Module) -> None:
    """Switch every dropout off: the first ratio of PPO is 1 only if training computes what the rollout computed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # residual_dropout, hidden_dropout, layerdrop: names differ by model
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
