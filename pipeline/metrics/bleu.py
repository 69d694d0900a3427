"""BLEU: Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation (2002), by sacreBLEU."""

from typing import Any

from sacrebleu.metrics import BLEU

from pipeline.metrics.checks import check_least, check_options
from pipeline.metrics.sacrebleu_metric import SacrebleuMetric, settings
from pipeline.metrics.text import UNSPACED_LANGUAGES, language_code

TOKENIZERS = dict.fromkeys(UNSPACED_LANGUAGES, "char") | {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
OPTIONS = {
    "tokenize": (str, type(None)),
    "lowercase": (bool,),
    "smooth_method": (str,),
    "smooth_value": (float, int, type(None)),
    "max_ngram_order": (int,),
    "effective_order": (bool,),
    "force": (bool,),
}


def load(name: str, language: str | None = None, **options: Any) -> SacrebleuMetric:
    """Make BLEU with sacreBLEU's defaults: cased, exponential smoothing, up to 4-grams.

    The tokenizer follows the language (`zh`, `ja-mecab`, `ko-mecab`, `char` for other languages without spaces, else
    `13a`) unless the option `tokenize` names one. Sample scores are sentence BLEU over the n-gram orders the
    prediction is long enough for (`effective_order`): otherwise every text below four words would be worth nothing.

    Raises:
        ValueError: an unknown option, tokenizer or smoothing method; an order that is none; a tokenizer whose package
            is not installed.
    """
    check_options(name, options, OPTIONS)
    check_least(name, options, {"max_ngram_order": 1})
    tokenizer = options.get("tokenize") or TOKENIZERS.get(language_code(language), "13a")
    if tokenizer not in BLEU.TOKENIZERS:
        raise ValueError(f"metric {name}: unknown tokenizer {tokenizer!r}; there are: {', '.join(BLEU.TOKENIZERS)}")
    smoothing = options.get("smooth_method", "exp")
    if smoothing not in BLEU.SMOOTH_DEFAULTS:
        methods = ", ".join(BLEU.SMOOTH_DEFAULTS)
        raise ValueError(f"metric {name}: unknown smooth_method {smoothing!r}; there are: {methods}")
    options = {**options, "tokenize": tokenizer}
    try:
        corpus = BLEU(**options)
        sentence = BLEU(**{**options, "effective_order": True})
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(_missing(name, tokenizer, error)) from error
    return SacrebleuMetric(name, settings(corpus), True, corpus, sentence)


def _missing(name: str, tokenizer: str, error: Exception) -> str:
    if tokenizer in ("ja-mecab", "ko-mecab"):
        extra = f"sacrebleu[{tokenizer[:2]}]"
        return f"metric {name}: the tokenizer {tokenizer} needs MeCab and its dictionary: pip install '{extra}'"
    reason = " ".join(str(error).split())
    return f"metric {name}: the tokenizer {tokenizer} cannot be used here ({reason})"
