"""Exact match: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.metrics.checks import check_options
from pipeline.metrics.mean_metric import MeanMetric
from pipeline.metrics.text import language_code, normalise_answer


def load(name: str, language: str | None = None, **options: Any) -> MeanMetric:
    """Make the metric that is 1 where the prediction equals one of the references after `normalise_answer`, else 0.

    Raises:
        ValueError: any option, for it has none.
    """
    check_options(name, options, {})
    articles = "no" if language_code(language) in (None, "en") else "yes"
    return MeanMetric(name, f"case:lc|punct:numbers|articles:{articles}", partial(_matches, language))


def _matches(language: str | None, prediction: str, references: Sequence[str]) -> float:
    answer = normalise_answer(prediction, language)
    return float(any(answer == normalise_answer(text, language) for text in references))
