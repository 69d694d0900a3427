"""Refuse examples and options that no metric can use, with one sentence each."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.runtime.messages import did_you_mean


def check_examples(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse examples that cannot be scored.

    Raises:
        ValueError: no examples; unequal lengths; a prediction that is not a text; references that are not a list of
            at least one text.
    """
    if len(predictions) != len(references):
        raise ValueError(f"found {len(predictions)} predictions for {len(references)} lists of references")
    if len(predictions) == 0:
        raise ValueError("there are no examples to score")
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"prediction {index} is a {type(prediction).__name__}, not a text")
        if isinstance(texts, str):
            raise ValueError(f"the references of example {index} are one text; give a list of texts")
        if len(texts) == 0:
            raise ValueError(f"example {index} has no reference")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the references of example {index} are not all texts: {list(texts)!r}")


def check_options(metric: str, options: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse an option that `metric` does not have, or a value of another type than `known` gives for it.

    Raises:
        ValueError: names the metric, the option and what would be right.
    """
    for option, value in options.items():
        if option not in known:
            has = f"it has: {', '.join(known)}" if known else "it has no options"
            hint = did_you_mean(option, known) or ";"
            raise ValueError(f"metric {metric}: unknown option {option!r}{hint} {has}")
        # In Python True is also an int, but `word_order: yes` is a mistake.
        misplaced = isinstance(value, bool) and bool not in known[option]
        if misplaced or not isinstance(value, known[option]):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in known[option])
            raise ValueError(f"metric {metric}: option {option!r} must be {expected}, found {value!r}")


def check_least(metric: str, options: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Refuse a number of an option below the one that `least` gives for it.

    Raises:
        ValueError: names the metric and the option.
    """
    for option, number in least.items():
        if options.get(option, number) < number:
            raise ValueError(f"metric {metric}: option {option!r} must be at least {number}, found {options[option]}")
