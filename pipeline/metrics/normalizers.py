"""Texts as error rates of speech compare them: transformers' copies of Whisper's normalizers, or as they are."""

from collections.abc import Callable
from functools import cache

NORMALIZERS = ("basic", "english")
Normalise = Callable[[str], str]


@cache
def load_normalizer(metric: str, name: str | None) -> tuple[Normalise, str]:
    """Load a normalizer by its name, for a metric; return it and what a signature says of it.

    `basic` removes case, punctuation and what stands in brackets; `english` also writes out contractions and writes
    numbers as digits. None keeps texts as they are.

    Raises:
        ValueError: no such normalizer.
    """
    if name is None:
        return str.strip, "case:mixed"
    if name not in NORMALIZERS:
        choices = ", ".join(NORMALIZERS)
        raise ValueError(f"metric {metric}: normalizer: {name!r} is not one of {choices}; or leave it out")
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    normalizer = BasicTextNormalizer() if name == "basic" else EnglishTextNormalizer({})
    return lambda text: normalizer(text).strip(), f"normalizer:{name}"
