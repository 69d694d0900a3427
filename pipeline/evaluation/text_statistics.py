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
    summaries; both are None where prompts are sounds. `empty`: share of texts without a word. `most_common`: share of
    the most frequent text among all.
    """

    length_ratio: float
    repetition: float
    distinct_1: float
    distinct_2: float
    copy_rate: float | None
    novel_2: float | None
    empty: float
    most_common: float


def text_statistics(texts: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None) -> TextStatistics:
    """Compute the figures of `texts`, one for each of the (first) `references` and `prompts`; None: no texts."""
    tokens = [words(text) for text in texts]
    total = sum(map(len, tokens))
    reference_total = sum(len(words(reference)) for reference in references)
    unigrams = {word for text in tokens for word in text}
    bigrams = [pair for text in tokens for pair in pairwise(text)]
    copied, novel = (None, None) if prompts is None else _copied_and_novel(tokens, prompts)
    return TextStatistics(
        length_ratio=_ratio(total, reference_total),
        repetition=sum(map(repetition, tokens)) / len(tokens),
        distinct_1=_ratio(len(unigrams), total),
        distinct_2=_ratio(len(set(bigrams)), len(bigrams)),
        copy_rate=None if copied is None else _ratio(copied, total),
        novel_2=None if novel is None else _ratio(novel, len(bigrams)),
        empty=sum(not text for text in tokens) / len(tokens),
        most_common=Counter(texts).most_common(1)[0][1] / len(texts),
    )


def _copied_and_novel(tokens: Sequence[Sequence[str]], prompts: Sequence[str]) -> tuple[int, int]:
    """Count the words that the prompt of their text has too, and the bigrams that it does not have."""
    prompt_tokens = [words(prompt) for prompt in prompts]
    vocabularies, prompt_bigrams = map(set, prompt_tokens), map(set, map(pairwise, prompt_tokens))
    copied = sum(word in prompt for text, prompt in zip(tokens, vocabularies, strict=True) for word in text)
    novel = sum(
        pair not in prompt for text, prompt in zip(tokens, prompt_bigrams, strict=True) for pair in pairwise(text)
    )
    return copied, novel


def repetition(tokens: Sequence[str]) -> float:
    """Compute the share of trigrams that occurred earlier in the same text; 0 for a text shorter than three words."""
    ngrams = [tuple(tokens[i : i + REPEATED_NGRAM]) for i in range(len(tokens) - REPEATED_NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
