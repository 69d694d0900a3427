"""Adapt the metrics of sacreBLEU to `Metric`: Post, A Call for Clarity in Reporting BLEU Scores (2018)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric as Scorer

from pipeline.metrics.checks import check_examples
from pipeline.metrics.resampling import resampled_sums, score_with_interval
from pipeline.metrics.types import Metric, Rows, Score


@dataclass(frozen=True)
class SacrebleuMetric:
    """Corpus scores by `corpus`, sample scores by `sentence`, both sacreBLEU scorers with results from 0 to 100.

    Where lower is better (TER), a sample score is 1 minus the error rate, and 0 for error rates above 1.
    """

    name: str
    signature: str
    higher_is_better: bool
    corpus: Scorer
    sentence: Scorer

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return one number in [0, 1] for each example, higher is better; see `Metric`."""
        check_examples(predictions, references)
        scores = [
            self.sentence.sentence_score(prediction, list(texts)).score / 100
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        # Rounding takes a perfect BLEU a little above 1.
        bounded = [min(max(score, 0.0), 1.0) for score in scores]
        return bounded if self.higher_is_better else [1 - score for score in bounded]

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: Rows
    ) -> np.ndarray:
        """Return the corpus score [R] of each row of `indices` [R, N]; see `Metric`.

        BLEU, chrF and TER are functions of sums over the examples, so each text is matched once, not once for each
        resample. sacreBLEU has no public way to reach the sums: `statistics` and `resample_statistics` use the only
        private names of it.
        """
        return self.resample_statistics(self.statistics(predictions, references), indices)

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Count matches, n-grams, words or edits of each example, [N, K]: what the corpus score is a function of."""
        check_examples(predictions, references)
        counts = self.corpus._extract_corpus_statistics(list(predictions), _streams(references))
        return np.array(counts, dtype=np.float64)

    def resample_statistics(self, statistics: np.ndarray, indices: Rows) -> np.ndarray:
        """Compute the corpus score [R] of each row of `indices` [R, N] from the `statistics` [N, K]."""
        totals = resampled_sums(statistics, indices)
        return np.array([self.corpus._compute_score_from_stats(total).score for total in totals.tolist()])

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Return sacreBLEU's score over all examples, with a bootstrap interval; see `Metric`.

        Warns as `short_references`.
        """
        check_examples(predictions, references)
        if text := short_references(self, references):
            warnings.warn(text, stacklevel=2)
        value = self.corpus.corpus_score(list(predictions), _streams(references)).score
        return replace(score_with_interval(self, predictions, references, n_bootstrap, confidence, seed), value=value)


def settings(scorer: Scorer) -> str:
    """Return the part of sacreBLEU's signature that does not depend on the data."""
    # sacreBLEU tells a signature only after it has seen references.
    scorer.corpus_score([""], [[""]])
    return str(scorer.get_signature()).removeprefix("nrefs:1|")


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Return `references` as sacreBLEU reads them: stream k holds the k-th reference of every example.

    None stands where an example has fewer; sacreBLEU leaves it out, while "" would count as a reference of length 0.
    """
    width = max(len(texts) for texts in references)
    return [[texts[k] if k < len(texts) else None for texts in references] for k in range(width)]


def short_references(metric: Metric, references: Sequence[Sequence[str]]) -> str | None:
    """Warn where most references are too short for corpus BLEU; None for other metrics and longer references.

    A text of fewer words than the highest n-gram order has no n-grams of that order. If no text has any, corpus BLEU
    is 0 even where all answers are right; if few have, those few decide it.
    """
    scorer = metric.corpus if isinstance(metric, SacrebleuMetric) else None
    if not isinstance(scorer, BLEU) or scorer.effective_order:
        return None
    order = scorer.max_ngram_order
    lengths = [max(len(scorer.tokenizer(text).split()) for text in texts) for texts in references]
    short = sum(length < order for length in lengths) / len(lengths)
    if short <= 0.5:
        return None
    return (
        f"{metric.name}: {short:.0%} of the references are shorter than {order} words, and corpus BLEU counts n-grams "
        f"of up to {order} words: right answers may score 0; use exact_match, token_f1 or chrf, or "
        f"{{name: {metric.name}, effective_order: true}}"
    )
