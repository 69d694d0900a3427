"""WER and CER: edits for each word or character of the references, as the library jiwer defines them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from nltk.metrics.distance import edit_distance

from pipeline.metrics.checks import check_examples, check_options
from pipeline.metrics.normalizers import Normalise, load_normalizer
from pipeline.metrics.resampling import resampled_sums, score_with_interval
from pipeline.metrics.text import UNSPACED_LANGUAGES, language_code, split_unspaced
from pipeline.metrics.types import Rows, Score

CACHED_PAIRS = 100_000  # the bootstrap and the tests ask for the same texts again
Split = Callable[[str], list[str]]


@dataclass(frozen=True)
class ErrorRateMetric:
    """The edits that make the reference of a prediction, in per cent of the units that `split` finds in references.

    Lower is better, from 0 to 100 and beyond. Of several references the one with the lowest rate counts. An empty
    reference counts as no unit, and as one where no reference has any. A sample score is 1 minus the rate, at least 0.
    """

    name: str
    signature: str
    split: Split
    normalise: Normalise = str.strip
    higher_is_better: bool = False

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return one number in [0, 1] for each example, higher is better; see `Metric`."""
        edits, units = self.statistics(predictions, references).T
        return (1 - np.minimum(1.0, edits / np.maximum(1, units))).tolist()

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: Rows
    ) -> np.ndarray:
        """Return the rate [R] of each row of `indices` [R, N], from the sums of edits and units; see `Metric`."""
        edits, units = resampled_sums(self.statistics(predictions, references), indices).T
        return 100 * edits / np.maximum(1, units)

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Count the edits and the units of the reference of each example, [N, 2]."""
        check_examples(predictions, references)
        counts = [
            min((self._edits_and_units(prediction, text) for text in texts), key=_rate)
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return np.array(counts, dtype=np.float64)

    def closest(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Return the reference of each example that the statistics are of: the one with the lowest rate."""
        return [
            min(texts, key=lambda text, prediction=prediction: _rate(self._edits_and_units(prediction, text)))
            for prediction, texts in zip(predictions, references, strict=True)
        ]

    def _edits_and_units(self, prediction: str, reference: str) -> tuple[int, int]:
        return _edits_and_units(self.split, self.normalise(prediction), self.normalise(reference))

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Return the rate over all examples, with its bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed)


def load(name: str, language: str | None = None, **options: Any) -> ErrorRateMetric:
    """Make `wer` or `cer` on the texts as they are, with case and punctuation, or as a `normalizer` makes them.

    `basic` and `english` are Whisper's normalizers, as transformers has them. Words stand between white space;
    languages without spaces have characters for words. Characters count with the spaces between them, without white
    space around the text.

    Raises:
        ValueError: an option other than `normalizer`, or one that is not there.
    """
    check_options(name, options, {"normalizer": (str, type(None))})
    normalise, rule = load_normalizer(name, options.get("normalizer"))
    unspaced = language_code(language) in UNSPACED_LANGUAGES
    if name == "cer":
        return ErrorRateMetric(name, f"units:characters|{rule}", _characters, normalise)
    return ErrorRateMetric(name, f"units:words|{rule}", split_unspaced if unspaced else str.split, normalise)


def _characters(text: str) -> list[str]:
    return list(text.strip())


@lru_cache(CACHED_PAIRS)
def _edits_and_units(split: Split, prediction: str, reference: str) -> tuple[int, int]:
    """Count the insertions, deletions and substitutions between two texts, and the units of the second."""
    expected = split(reference)
    return edit_distance(split(prediction), expected), len(expected)


def _rate(counts: tuple[int, int]) -> float:
    edits, units = counts
    return edits / max(1, units)
