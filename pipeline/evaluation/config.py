"""The `eval:` section."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SYSTEMS = ("base", "sft", "ppo")
CONTROL = "control"
SHUFFLED, CONSTANT = "shuffled scores", "a constant reward"  # the kinds of control
SFT_BY_METRIC, SFT_LONGER = "sft_by_metric", "sft_longer"
BASELINES = (SFT_BY_METRIC, SFT_LONGER)
TUNED_ON = ("validation", "test", "not tuned")
AUTO = "auto"
MIN_BOOTSTRAP = 1000  # p-values of fewer resamples are too coarse for a verdict


@dataclass(frozen=True)
class MetricConfig:
    """One line of `eval.metrics`: a name, or a mapping with a name and the metric's own options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SystemConfig:
    """A further system of `eval.systems`: any causal model, by directory (an adapter's too) or Hub id."""

    name: str
    path: str

    def __post_init__(self) -> None:
        if self.name in (*SYSTEMS, CONTROL, *BASELINES) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"eval.systems: a further system needs a name of letters, digits, '.', '_' and '-' that is not one of "
                f"{', '.join((*SYSTEMS, CONTROL, *BASELINES))}, found {self.name!r}"
            )
        if not self.path:
            raise ValueError(f"eval.systems: {self.name!r} needs a path: a model directory or a Hub id")


@dataclass(frozen=True)
class EvalConfig:
    """How the systems are compared on the test split. Decoding is the same for all: beam search, greedy at 1 beam.

    `control` is the run directory of a control that started from the same SFT model, with `ppo.shuffle_scores` or a
    constant reward; `auto` picks one next to this run if there is one, null none.
    `beam_sizes` scores SFT, PPO and further systems with other numbers of beams as well; `samples_per_prompt` answers
    the first `sample_prompts` prompts that many times at `sample_temperature`, for the best-of-n curve; 0 omits it.
    `num_inspected` examples are shown token by token.
    """

    # further ones are mappings: {name: other, path: DIRECTORY_OR_HUB_ID}
    systems: tuple[str | SystemConfig, ...] = SYSTEMS
    # the directory of a run with ppo.shuffle_scores or a constant reward; auto finds one beside this run, None: none
    control: str | None = AUTO
    # SFT models that PPO is compared with too: sft_by_metric, the checkpoint of SFT that PPO's rule chooses, and
    # sft_longer, SFT for as long as SFT and PPO took together
    baselines: tuple[str, ...] = ()
    # what chose the hyper-parameters, for the report to say: validation, test or not tuned
    hyperparameters: str | None = None
    metrics: tuple[MetricConfig, ...] = (MetricConfig("bleu"), MetricConfig("chrf"))  # the first decides the verdict
    num_beams: int = 1  # the decoding of every score; 1 is greedy
    beam_sizes: tuple[int, ...] = ()  # other numbers of beams to show beside it
    samples_per_prompt: int = 4  # for the best-of-n curve; 0 leaves it out
    sample_prompts: int = 100  # prompts of that curve
    sample_temperature: float = 1.0  # of those samples
    max_new_tokens: int | None = None  # None: ppo.response_length
    min_new_tokens: int | None = None  # None: ppo.min_new_tokens
    stop_strings: tuple[str, ...] | None = None  # None: ppo.stop_strings
    suppress_tokens: tuple[int, ...] | None = None  # None: ppo.suppress_tokens
    per_device_eval_batch_size: int = 64  # prompts answered at once
    n_bootstrap: int = 1000  # resamples of intervals and tests; below 1000 the report gives no verdict
    confidence: float = 0.95  # what the intervals of the scores cover
    num_samples: int = 5  # side-by-side predictions in report.md
    num_listed: int = 500  # searchable predictions in report.html
    num_inspected: int = 4  # examples shown token by token in report.html

    def __post_init__(self) -> None:
        for system in self.systems:
            if isinstance(system, str) and system not in SYSTEMS:
                raise ValueError(
                    f"eval.systems: {system!r} is not one of {', '.join(SYSTEMS)}; "
                    f"another model is a mapping: {{name: ..., path: a directory or Hub id}}"
                )
        for name in self.baselines:
            if name not in BASELINES or self.baselines.count(name) > 1:
                raise ValueError(f"eval.baselines: each of {', '.join(BASELINES)} at most once, found {name!r}")
        if self.baselines and "ppo" not in self.systems:
            raise ValueError("eval.baselines: PPO is compared with them, so eval.systems must have ppo")
        if self.hyperparameters not in (None, *TUNED_ON):
            rule = f"must be one of {', '.join(TUNED_ON)}, or null"
            raise ValueError(f"eval.hyperparameters: {rule}, found {self.hyperparameters!r}")
        names = self.system_names
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"eval.systems: each system once, at least one, found {list(names)}")
        if not self.metrics:
            raise ValueError("eval.metrics: at least one metric is needed")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("n_bootstrap", "num_beams", "per_device_eval_batch_size", "sample_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}: must be at least 1, found {getattr(self, name)}")
        for size in self.beam_sizes:
            if size < 1 or size == self.num_beams:
                raise ValueError(
                    f"eval.beam_sizes: numbers of beams other than eval.num_beams ({self.num_beams}), at least 1, "
                    f"found {size}"
                )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"eval.max_new_tokens: must be at least 1, found {self.max_new_tokens}")
        for name in ("num_samples", "num_listed", "num_inspected", "samples_per_prompt"):
            if getattr(self, name) < 0:
                raise ValueError(f"eval.{name}: must be at least 0, found {getattr(self, name)}")
        if not self.sample_temperature > 0:
            raise ValueError(f"eval.sample_temperature: must be above 0, found {self.sample_temperature}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"eval.confidence: must be between 0 and 1, found {self.confidence}")

    @property
    def system_names(self) -> tuple[str, ...]:
        """Return the names of the systems, in the report's order, without control and baselines."""
        return tuple(system if isinstance(system, str) else system.name for system in self.systems)

    @property
    def further_systems(self) -> tuple[SystemConfig, ...]:
        """Return the systems that no stage of this run made."""
        return tuple(system for system in self.systems if isinstance(system, SystemConfig))
