"""Metrics whose corpus score is the mean over the examples: ROUGE, exact match, token F1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.checks import check_examples
from pipeline.metrics.resampling import resampled_means, score_with_interval
from pipeline.metrics.types import Rows, Score


@dataclass(frozen=True)
class MeanMetric:
    """A metric made of `score_example(prediction, references)`, in [0, 1]; corpus scores are 100 times its mean."""

    name: str
    signature: str
    score_example: Callable[[str, Sequence[str]], float]
    higher_is_better: bool = True

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return one number in [0, 1] for each example; see `Metric`."""
        check_examples(predictions, references)
        return [float(self.score_example(*example)) for example in zip(predictions, references, strict=True)]

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: Rows
    ) -> np.ndarray:
        """Return the score [R], 0 to 100, of each row of `indices` [R, N]; see `Metric`."""
        return self.resample_statistics(self.statistics(predictions, references), indices)

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Compute the sample scores, [N, 1]."""
        return np.array(self.sample_scores(predictions, references), dtype=np.float64).reshape(-1, 1)

    def resample_statistics(self, statistics: np.ndarray, indices: Rows) -> np.ndarray:
        """Compute the score [R] of each row of `indices` [R, N] from the `statistics` [N, 1]."""
        return 100 * resampled_means(statistics[:, 0], indices)

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Return the score over all examples, 0 to 100, with its bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed)
