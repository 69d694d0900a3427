"""TER: Snover et al., A Study of Translation Edit Rate with Targeted Human Annotation (2006), by sacreBLEU."""

from typing import Any

from sacrebleu.metrics import TER

from pipeline.metrics.checks import check_options
from pipeline.metrics.sacrebleu_metric import SacrebleuMetric, settings
from pipeline.metrics.text import language_code

OPTIONS = {"normalized": (bool,), "no_punct": (bool,), "asian_support": (bool,), "case_sensitive": (bool,)}


def load(name: str, language: str | None = None, **options: Any) -> SacrebleuMetric:
    """TER with sacreBLEU's defaults: case ignored, words as they stand between spaces.

    Lower is better, from 0 to 100 and beyond: a text much longer than its reference needs more edits than that has
    words. Chinese and Japanese are split into characters (`normalized` and `asian_support`) unless the options say
    otherwise, since without spaces a whole sentence would be one word.

    Raises:
        ValueError: an unknown option.
    """
    check_options(name, options, OPTIONS)
    if language_code(language) in ("zh", "ja"):
        options = {"normalized": True, "asian_support": True, **options}
    scorer = TER(**options)
    return SacrebleuMetric(name, settings(scorer), False, scorer, scorer)
