"""The types every metric shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

# The example numbers of R resamples: [R, N], or R arrays of unequal lengths where whole clusters are drawn.
Rows = np.ndarray | Sequence[np.ndarray]


@dataclass(frozen=True)
class Score:
    """A corpus score with its bootstrap interval, on the metric's conventional scale (0 to 100 for built-in metrics).

    `low` and `high` are percentiles of the resampled scores; without resamples both equal `value`. `signature` holds
    all that is needed to compute the same number again, in sacreBLEU's notation (`key:value|key:value`).
    """

    value: float
    low: float
    high: float
    signature: str


@runtime_checkable
class Metric(Protocol):
    """A text metric over N examples, each with a prediction and at least one reference.

    All three methods take `predictions` (N texts) and `references` (N lists of texts, of any lengths from 1) and raise
    ValueError for no examples, for unequal lengths and for an example without a reference.
    """

    @property
    def name(self) -> str:
        """Return the name that the metric was asked for by."""
        ...

    @property
    def signature(self) -> str:
        """Return the settings that determine the numbers."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Return whether a higher corpus score is better; sample scores always point up."""
        ...

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return one number for each example, higher is better; in [0, 1] for the built-in metrics."""
        ...

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: Rows
    ) -> np.ndarray:
        """Return the corpus score [R] of each resample; `indices` holds the example numbers of each, see `Rows`."""
        ...

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Return the score over all examples, with a bootstrap interval that covers `confidence`."""
        ...
