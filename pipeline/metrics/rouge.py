"""ROUGE-1, -2, -L and -Lsum: Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004), by rouge_score."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from pipeline.metrics.checks import check_options
from pipeline.metrics.mean_metric import MeanMetric
from pipeline.metrics.text import language_code, words

OPTIONS = {"use_stemmer": (bool,)}


@dataclass(frozen=True)
class UnicodeTokenizer:
    """Split any script into words; the tokenizer of rouge_score knows only a to z and cuts `für` into `f` and `r`.

    On ASCII text it gives the same tokens, stemmed or not.
    """

    stemmer: PorterStemmer | None = None

    def tokenize(self, text: str) -> list[str]:
        """Return the words of `text`; with a stemmer, the stems of those above three letters."""
        if self.stemmer is None:
            return words(text)
        return [self.stemmer.stem(word) if len(word) > 3 else word for word in words(text)]


def load(name: str, language: str | None = None, **options: Any) -> MeanMetric:
    """Make ROUGE F1, the best over an example's references. `name` is rouge1, rouge2, rougeL or rougeLsum.

    ROUGE-Lsum takes lines for sentences, as rouge_score does: of a text in one line it is ROUGE-L.
    The option `use_stemmer` (off by default) strips English suffixes.

    Raises:
        ValueError: an unknown option; a stemmer for another language than English.
    """
    check_options(name, options, OPTIONS)
    use_stemmer = options.get("use_stemmer", False)
    if use_stemmer and language_code(language) not in (None, "en"):
        raise ValueError(f"metric {name}: use_stemmer is for English only, and the task's language is {language!r}")
    tokenizer = UnicodeTokenizer(PorterStemmer() if use_stemmer else None)
    stem = "porter" if use_stemmer else "no"
    signature = f"case:lc|tok:unicode-words|stem:{stem}|version:rouge-score-{version('rouge-score')}"
    return MeanMetric(name, signature, partial(_best_f1, RougeScorer([name], tokenizer=tokenizer), name))


def _best_f1(scorer: RougeScorer, rouge_type: str, prediction: str, references: Sequence[str]) -> float:
    return scorer.score_multi(references, prediction)[rouge_type].fmeasure
