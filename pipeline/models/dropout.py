"""Dropout off, whatever a model calls it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def remove_dropout(model: nn.Module) -> None:
    """Switch every dropout off: the first ratio of PPO is 1 only if training computes what the rollout computed."""
    for module, name, _ in _settings(model):
        setattr(module, name, 0.0)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch every dropout off until the block ends."""
    settings = _settings(model)
    remove_dropout(model)
    try:
        yield
    finally:
        for module, name, value in settings:
            setattr(module, name, value)


def _settings(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """List what sets a dropout: residual_dropout, hidden_dropout, layerdrop and others, as names differ by model."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout)))
    ]
