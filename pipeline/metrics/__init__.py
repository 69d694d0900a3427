"""Load text metrics: BLEU, chrF, TER, ROUGE, exact match, token F1, those of `evaluate`, and those of users."""

import importlib
from typing import Any

from pipeline.metrics.text import language_code
from pipeline.metrics.types import Metric, Score
from pipeline.runtime.messages import did_you_mean

__all__ = ["METRIC_NAMES", "Metric", "Score", "load_metric"]

METRIC_NAMES = ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1")

_CHOICES = (
    f"there are: {', '.join(METRIC_NAMES)}, evaluate:NAME for one of the evaluate library, and the dotted path of "
    "your own (package.module.Thing)"
)


def load_metric(name: str, language: str | None = None, **options: Any) -> Metric:
    """Load the metric called `name`: one of `METRIC_NAMES`, `evaluate:NAME_OR_PATH`, or `package.module.Thing`.

    `language` is the language of the texts (see `language_code`), by which built-in metrics choose their tokenizer.
    `options` go to the metric. `Thing` is a class or function that gives a `Metric` when called with the options.

    Raises:
        ValueError: an unknown name, language or option, or something the metric needs is missing.
    """
    language_code(language)  # refuses what is no language, for metrics that need none, too
    if name in METRIC_NAMES:
        module = "rouge" if name.startswith("rouge") else name
        return importlib.import_module(f"pipeline.metrics.{module}").load(name, language, **options)
    if name.startswith("evaluate:"):
        return importlib.import_module("pipeline.metrics.evaluate_library").load(name, **options)
    if "." in name:
        return _load_dotted(name, options)
    raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRIC_NAMES) or ';'} {_CHOICES}")


def _load_dotted(name: str, options: dict[str, Any]) -> Metric:
    module, _, thing = name.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), thing)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} cannot be imported ({error}); {_CHOICES}") from error
    try:
        metric = make(**options)
    except TypeError as error:
        raise ValueError(f"metric {name!r} cannot be called with the options {options!r} ({error})") from error
    if not isinstance(metric, Metric):
        members = "name, signature, higher_is_better, sample_scores, resampled_scores and corpus_score"
        raise ValueError(f"metric {name!r} gave a {type(metric).__name__}, which is no metric: it needs {members}")
    return metric
