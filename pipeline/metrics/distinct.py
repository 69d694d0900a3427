"""Distinct-n: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (2016)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.metrics.checks import check_examples, check_options
from pipeline.metrics.resampling import score_with_interval
from pipeline.metrics.text import words
from pipeline.metrics.types import Rows, Score


@dataclass(frozen=True)
class DistinctMetric:
    """The different n-grams of all predictions, in per cent of their n-grams; references play no role.

    It falls with the number of texts, so only sets of one size compare. A resample holds some texts twice, which adds
    n-grams and none that are different: its scores are too low, and intervals are moved to the score of all texts (see
    `centre_resamples`). A sample score is that of one text alone, which falls where the text repeats itself.
    """

    name: str
    signature: str
    order: int
    higher_is_better: bool = True

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return one number in [0, 1] for each example; 0 for a text that is too short for an n-gram."""
        check_examples(predictions, references)
        ngrams = map(self._ngrams, predictions)
        return [len(set(of_text)) / len(of_text) if of_text else 0.0 for of_text in ngrams]

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: Rows
    ) -> np.ndarray:
        """Return the score [R] of each row of `indices` [R, N]; see `Metric`."""
        check_examples(predictions, references)
        ngrams = [self._ngrams(text) for text in predictions]
        totals = np.array([len(of_text) for of_text in ngrams])
        numbers: dict[tuple[str, ...], int] = {}
        by_text = [np.array([numbers.setdefault(ngram, len(numbers)) for ngram in of_text], int) for of_text in ngrams]

        def score(row: np.ndarray) -> float:
            seen = np.zeros(len(numbers), dtype=bool)
            seen[np.concatenate([by_text[i] for i in np.unique(row)])] = True
            return 100 * seen.sum() / max(1, totals[row].sum())

        return np.array([score(np.asarray(row)) for row in indices], dtype=np.float64)

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Return the score of all predictions together, with its bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed, centre=True)

    def _ngrams(self, text: str) -> list[tuple[str, ...]]:
        tokens = words(text)
        return [tuple(tokens[i : i + self.order]) for i in range(len(tokens) - self.order + 1)]


def load(name: str, language: str | None = None, **options: Any) -> DistinctMetric:
    """Make `distinct1` or `distinct2` on lower-cased words, as the report's statistics of texts count them.

    Raises:
        ValueError: any option, for it has none.
    """
    check_options(name, options, {})
    return DistinctMetric(name, "case:lc|tok:unicode-words", int(name.removeprefix("distinct")))
