"""SQuAD's exact match and F1: Rajpurkar et al., Know What You Don't Know: Unanswerable Questions for SQuAD (2018)."""

import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pipeline.metrics.checks import check_options
from pipeline.metrics.mean_metric import MeanMetric
from pipeline.metrics.text import ENGLISH_ARTICLES, language_code
from pipeline.metrics.token_f1 import word_f1

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def load(name: str, language: str | None = None, **options: Any) -> MeanMetric:
    """Make `squad_em` or `squad_f1` with the normalisation of SQuAD's own script, the best over the references.

    It is the same for every language. `exact_match` and `token_f1` know more punctuation and languages; figures that
    are compared with those of papers on SQuAD need this one. Two empty answers agree, as in SQuAD 2.0.

    Raises:
        ValueError: any option, for it has none; a language that is none.
    """
    check_options(name, options, {})
    language_code(language)
    score = _equal if name == "squad_em" else word_f1
    return MeanMetric(name, "norm:squad|articles:no|punct:ascii", partial(_best, score))


def squad_words(text: str) -> list[str]:
    """Return the words of an answer: lower case, without ASCII punctuation and then without English articles."""
    return ENGLISH_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _best(score: Callable[[list[str], list[str]], float], prediction: str, references: Sequence[str]) -> float:
    predicted = squad_words(prediction)
    return max(score(predicted, squad_words(text)) for text in references)


def _equal(predicted: list[str], expected: list[str]) -> float:
    return float(predicted == expected)
