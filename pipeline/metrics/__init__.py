"""Load text metrics by name: Relay's, those of the library `evaluate`, and those of users."""

import importlib
from typing import Any

from pipeline.metrics.text import language_code
from pipeline.metrics.types import Metric, Score
from pipeline.runtime.messages import did_you_mean
from pipeline.runtime.user_code import FORMS, UserCodeError, is_user_code, load_user_object

__all__ = ["METRIC_NAMES", "Metric", "Score", "is_metric", "load_metric"]

# The file of each metric.
_FILES = {name: name for name in ("bleu", "chrf", "ter")}
_FILES |= dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), "rouge")
_FILES |= {"exact_match": "exact_match", "token_f1": "token_f1", "squad_em": "squad", "squad_f1": "squad"}
_FILES |= dict.fromkeys(("wer", "cer"), "error_rate") | dict.fromkeys(("distinct1", "distinct2"), "distinct")
METRIC_NAMES = tuple(_FILES)
_FILES["bertscore"] = "bertscore"  # which needs a package that Relay does not
REFUSED_NAMES = {
    "comet": "its package unbabel-comet needs transformers below 5, so it cannot be installed beside Relay; pip "
    "install unbabel-comet in an environment of its own, and score eval/predictions/*.jsonl of the run there",
    "judge": "a judge compares two systems and reads their prompts; python recipes/judge_pairs.py RUN --url URL "
    "--model NAME asks one about a finished run",
}

_CHOICES = (
    f"there are: {', '.join(METRIC_NAMES)}, evaluate:NAME for one of the evaluate library, and your own ({FORMS})"
)


def is_metric(name: str) -> bool:
    """Tell whether a name is that of a metric of Relay or of `evaluate`, whether or not it can be loaded."""
    return name in _FILES or name in REFUSED_NAMES or name.startswith("evaluate:")


def load_metric(name: str, language: str | None = None, **options: Any) -> Metric:
    """Load the metric called `name`: one of `METRIC_NAMES`, `evaluate:NAME_OR_PATH`, or a user's own.

    `language` is the language of the texts (see `language_code`), by which built-in metrics choose their tokenizer.
    `options` go to the metric. `Thing` is a class or function that gives a `Metric` when called with the options.

    Raises:
        ValueError: an unknown name, language or option, or something the metric needs is missing.
    """
    language_code(language)  # refuses what is no language, for metrics that need none, too
    if name in REFUSED_NAMES:
        raise ValueError(f"metric {name!r}: {REFUSED_NAMES[name]}")
    if name in _FILES:
        return importlib.import_module(f"pipeline.metrics.{_FILES[name]}").load(name, language, **options)
    if name.startswith("evaluate:"):
        return importlib.import_module("pipeline.metrics.evaluate_library").load(name, **options)
    if is_user_code(name):
        return _load_own(name, options)
    raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRIC_NAMES) or ';'} {_CHOICES}")


def _load_own(name: str, options: dict[str, Any]) -> Metric:
    try:
        make = load_user_object(name)
    except UserCodeError as error:
        raise ValueError(f"metric {name!r}: {error}; {_CHOICES}") from error
    try:
        metric = make(**options)
    except TypeError as error:
        raise ValueError(f"metric {name!r} cannot be called with the options {options!r} ({error})") from error
    if not isinstance(metric, Metric):
        members = "name, signature, higher_is_better, sample_scores, resampled_scores and corpus_score"
        raise ValueError(f"metric {name!r} gave a {type(metric).__name__}, which is no metric: it needs {members}")
    return metric
