"""A metric that knows what some texts add to a corpus, because another process has counted it."""

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.metrics.checks import check_examples
from pipeline.metrics.resampling import score_with_interval
from pipeline.metrics.types import AdditiveMetric, Score


class KnownStatistics:
    """`metric` with the statistics of known examples; all figures are its own, to the bit. See `Metric`."""

    def __init__(
        self, metric: AdditiveMetric, known: Iterable[tuple[str, Sequence[str], Sequence[float]]] = ()
    ) -> None:
        """`known`: a text, its references, and what `metric.statistics` gives for them, [K]."""
        self.metric = metric
        self.name, self.signature, self.higher_is_better = metric.name, metric.signature, metric.higher_is_better
        self._known = {(text, tuple(references)): row for text, references, row in known}

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """One number for each example; see `Metric`."""
        return self.metric.sample_scores(predictions, references)

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: np.ndarray
    ) -> np.ndarray:
        """The corpus score [R] of each row of `indices` [R, N]; see `Metric`."""
        check_examples(predictions, references)
        keys = [(text, tuple(texts)) for text, texts in zip(predictions, references, strict=True)]
        unknown = list(dict.fromkeys(key for key in keys if key not in self._known))
        if unknown:
            rows = self.metric.statistics([text for text, _ in unknown], [list(texts) for _, texts in unknown])
            self._known.update(zip(unknown, rows.tolist(), strict=True))
        statistics = np.array([self._known[key] for key in keys], dtype=np.float64)
        return self.metric.resample_statistics(statistics, indices)

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """The score over all examples, with a bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed)
