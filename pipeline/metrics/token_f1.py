"""Token F1: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016)."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.metrics.checks import check_options
from pipeline.metrics.mean_metric import MeanMetric
from pipeline.metrics.text import language_code, normalise_answer, split_unspaced


def load(name: str, language: str | None = None, **options: Any) -> MeanMetric:
    """Make the F1 of the words shared with a reference after `normalise_answer`, the best over the references.

    Two empty texts agree (1); one empty text shares nothing (0), as in SQuAD 2.0.

    Raises:
        ValueError: any option, for it has none.
    """
    check_options(name, options, {})
    articles = "no" if language_code(language) in (None, "en") else "yes"
    return MeanMetric(name, f"case:lc|punct:numbers|articles:{articles}", partial(_best_f1, language))


def _best_f1(language: str | None, prediction: str, references: Sequence[str]) -> float:
    predicted = split_unspaced(normalise_answer(prediction, language))
    return max(word_f1(predicted, split_unspaced(normalise_answer(text, language))) for text in references)


def word_f1(predicted: list[str], expected: list[str]) -> float:
    """Compute the F1 of the words that two texts share; two texts without words agree."""
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))
