"""chrF: Popovic, chrF: character n-gram F-score for automatic MT evaluation (2015), by sacreBLEU."""

from typing import Any

from sacrebleu.metrics import CHRF

from pipeline.metrics.checks import check_least, check_options
from pipeline.metrics.sacrebleu_metric import SacrebleuMetric, settings

OPTIONS = {
    "char_order": (int,),
    "word_order": (int,),
    "beta": (int,),
    "lowercase": (bool,),
    "whitespace": (bool,),
    "eps_smoothing": (bool,),
}


def load(name: str, language: str | None = None, **options: Any) -> SacrebleuMetric:
    """Make chrF2 with sacreBLEU's defaults: character 1- to 6-grams; the option `word_order: 2` makes it chrF++.

    It needs no tokenizer, so it is the same for every language.

    Raises:
        ValueError: an unknown option, or an order that is none.
    """
    check_options(name, options, OPTIONS)
    check_least(name, options, {"char_order": 1, "word_order": 0})
    scorer = CHRF(**options)
    return SacrebleuMetric(name, settings(scorer), True, scorer, scorer)
