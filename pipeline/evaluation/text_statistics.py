"""Statistics of texts apart from their quality: length, repetition, variety, copying from the prompt, collapse."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.metrics.text import words

REPEATED_NGRAM = 3


@dataclass(frozen=True)
class TextStatistics:
    """Figures of N texts in words (lower-cased runs of letters and digits; each Han or Kana character by itself).

    `length_ratio`: words per word of the first references. `repetition`: mean share of a text's trigrams that it
    already had. `distinct_1`, `distinct_2`: different words and bigrams of all texts per word and bigram (Li et al.
    2016); they fall with the number of texts, so compare sets of one size only. `copy_rate`: share of all words that
    the example's prompt has too. `novel_2`: share of all bigrams that the prompt does not have, the novelty of
    summaries. `empty`: share of texts without a word. `most_common`: share of the most frequent
    text among all.
    """

    length_ratio: float
    repetition: float
    distinct_1: float
    distinct_2: float
    copy_rate: float
    novel_2: float
    empty: float
    most_common: float


def text_statistics(texts: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> TextStatistics:
    """Compute the figures of `texts`, one for each of the (first) `references` and `prompts`."""
    tokens = [words(text) for text in texts]
    total = sum(map(len, tokens))
    reference_total = sum(len(words(reference)) for reference in references)
    unigrams = {word for text in tokens for word in text}
    bigrams = [pair for text in tokens for pair in pairwise(text)]
    prompt_tokens = [words(prompt) for prompt in prompts]
    vocabularies, prompt_bigrams = map(set, prompt_tokens), map(set, map(pairwise, prompt_tokens))
    copied = sum(word in known for text, known in zip(tokens, vocabularies, strict=True) for word in text)
    novel = sum(b not in known for text, known in zip(tokens, prompt_bigrams, strict=True) for b in pairwise(text))
    return TextStatistics(
        length_ratio=_ratio(total, reference_total),
        repetition=sum(map(repetition, tokens)) / len(tokens),
        distinct_1=_ratio(len(unigrams), total),
        distinct_2=_ratio(len(set(bigrams)), len(bigrams)),
        copy_rate=_ratio(copied, total),
        novel_2=_ratio(novel, len(bigrams)),
        empty=sum(not text for text in tokens) / len(tokens),
        most_common=Counter(texts).most_common(1)[0][1] / len(texts),
    )


def repetition(tokens: Sequence[str]) -> float:
    """Compute the share of trigrams that occurred earlier in the same text; 0 for a text shorter than three words."""
    ngrams = [tuple(tokens[i : i + REPEATED_NGRAM]) for i in range(len(tokens) - REPEATED_NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
