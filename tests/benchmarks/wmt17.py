"""BLEU's counts for 16 systems of WMT17, English to German, sentence by sentence, and p-values that were published.

The texts and the p-values of MultEval and Moses are in sacreBLEU's test data (test/test_significance.py, Apache-2.0;
Post 2018). `statistics.npz` has no text: for each system and sentence the number of words and how many n-grams of
each order match, as `BLEU(tokenize="none")` of sacreBLEU counts them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU

from pipeline.metrics import Score

FOLDER = Path(__file__).with_name("wmt17")
BLOCK = 250  # resamples that are counted at once


def load_statistics() -> dict[str, np.ndarray]:
    """Load the counts [3004, 10] of every system: words, reference words, matches of 1 to 4-grams, their numbers."""
    with np.load(FOLDER / "statistics.npz") as file:
        lengths, matches, reference = (file[name].astype(np.int64) for name in ("lengths", "matches", "reference"))
        systems = file["systems"].tolist()
    totals = np.maximum(lengths[..., None] - np.arange(4), 0)
    columns = [lengths[..., None], np.broadcast_to(reference[None, :, None], (*lengths.shape, 1)), matches, totals]
    return dict(zip(systems, np.concatenate(columns, axis=2), strict=True))


def load_p_values() -> dict[str, dict[str, float] | str]:
    """Load the name of the baseline and the published p-values of each other system, of MultEval and of Moses."""
    return json.loads((FOLDER / "p_values.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class CountedBleu:
    """Corpus BLEU as a `Metric` whose texts are row numbers of `counts` [M, 10]."""

    counts: np.ndarray
    name: str = "bleu"
    signature: str = ""
    higher_is_better: bool = True

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Score every row by itself."""
        return corpus_bleu(self.counts[_rows(predictions)]).tolist()

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: np.ndarray
    ) -> np.ndarray:
        """Compute corpus BLEU [R] of each row of `indices` [R, N]."""
        return corpus_bleu(resampled_counts(self.counts[_rows(predictions)], indices))

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Score all rows together, without an interval."""
        value = float(corpus_bleu(self.counts[_rows(predictions)].sum(axis=0, keepdims=True))[0])
        return Score(value, value, value, self.signature)


def _rows(texts: Sequence[str]) -> np.ndarray:
    return np.array([int(text) for text in texts])


def resampled_counts(counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Sum `counts` [M, K] over each row of `indices` [R, N]: [R, K]. Whole numbers, so the order does not matter."""
    size, counts = len(counts), counts.astype(np.float64)
    sums = []
    for start in range(0, len(indices), BLOCK):
        block = indices[start : start + BLOCK]
        cells = (np.arange(len(block))[:, None] * size + block).ravel()
        sums.append(np.bincount(cells, minlength=len(block) * size).reshape(len(block), size) @ counts)
    return np.vstack(sums)


def corpus_bleu(totals: np.ndarray) -> np.ndarray:
    """Compute BLEU [R] of summed counts [R, 10]; where an order has no match, sacreBLEU smooths and computes it."""
    words, reference, matches, numbers = totals[:, 0], totals[:, 1], totals[:, 2:6], totals[:, 6:]
    plain = (matches > 0).all(axis=1)
    scores = np.empty(len(totals))
    precisions = np.log(matches[plain] / numbers[plain]).mean(axis=1)
    scores[plain] = 100 * np.exp(precisions + np.minimum(0.0, 1 - reference[plain] / words[plain]))
    bleu = BLEU(tokenize="none", force=True)
    for row in np.flatnonzero(~plain):
        scores[row] = bleu._compute_score_from_stats(totals[row].tolist()).score
    return scores
