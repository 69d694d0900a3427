"""TER: Snover et al., A Study of Translation Edit Rate with Targeted Human Annotation (2006), by sacreBLEU."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sacrebleu.metrics import TER

from pipeline.metrics.checks import check_options
from pipeline.metrics.sacrebleu_metric import SacrebleuMetric, settings
from pipeline.metrics.text import UNSPACED_LANGUAGES, language_code, split_unspaced

CHINESE_AND_JAPANESE = frozenset({"zh", "yue", "ja"})
OPTIONS = {"normalized": (bool,), "no_punct": (bool,), "asian_support": (bool,), "case_sensitive": (bool,)}


def load(name: str, language: str | None = None, **options: Any) -> SacrebleuMetric:
    """Make TER with sacreBLEU's defaults: case ignored, words as they stand between spaces.

    Lower is better, from 0 to 100 and beyond: a text much longer than its reference needs more edits than that has
    words. Chinese and Japanese are split into characters (`normalized` and `asian_support`) unless the options say
    otherwise, and so are Thai, Lao, Khmer, Burmese and Tibetan: without spaces a whole sentence would be one word.

    Raises:
        ValueError: an unknown option.
    """
    check_options(name, options, OPTIONS)
    code = language_code(language)
    if code in CHINESE_AND_JAPANESE:
        options = {"normalized": True, "asian_support": True, **options}
    scorer = TER(**options)
    signature = settings(scorer)
    if code in UNSPACED_LANGUAGES - CHINESE_AND_JAPANESE:
        scorer.tokenizer = partial(_characters, scorer.tokenizer)
        signature += "|words:characters"
    return SacrebleuMetric(name, signature, False, scorer, scorer)


def _characters(tokenizer: Callable[[str], str], text: str) -> str:
    return " ".join(split_unspaced(tokenizer(text)))
