"""The `eval:` section."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SYSTEMS = ("base", "sft", "ppo")


@dataclass(frozen=True)
class MetricConfig:
    """One line of `eval.metrics`: a name, or a mapping with a name and the metric's own options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalConfig:
    """How the systems are compared on the test split. Decoding is the same for all: beam search, greedy at 1 beam."""

    systems: tuple[str, ...] = SYSTEMS
    metrics: tuple[MetricConfig, ...] = (MetricConfig("bleu"), MetricConfig("chrf"))
    num_beams: int = 1
    max_new_tokens: int | None = None  # None: ppo.response_length
    per_device_eval_batch_size: int = 64
    n_bootstrap: int = 1000
    confidence: float = 0.95
    num_samples: int = 5  # side-by-side predictions in report.md

    def __post_init__(self) -> None:
        for system in self.systems:
            if system not in SYSTEMS:
                raise ValueError(f"eval.systems: {system!r} is not one of {', '.join(SYSTEMS)}")
        if len(set(self.systems)) != len(self.systems) or not self.systems:
            raise ValueError(f"eval.systems: each system once, at least one, found {list(self.systems)}")
        if not self.metrics:
            raise ValueError("eval.metrics: at least one metric is needed")
        for name in ("num_beams", "per_device_eval_batch_size", "n_bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}: must be at least 1, found {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"eval.max_new_tokens: must be at least 1, found {self.max_new_tokens}")
        if self.num_samples < 0:
            raise ValueError(f"eval.num_samples: must be at least 0, found {self.num_samples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"eval.confidence: must be between 0 and 1, found {self.confidence}")
