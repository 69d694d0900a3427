"""Words and normalised answers, for every script."""

import re
import string
import unicodedata

# Han and Kana are written without spaces between words, so each character counts as a word (as in the evaluation
# scripts of CMRC 2018 and MLQA).
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")


def language_code(language: str | None) -> str | None:
    """The language of a tag, in lower case: `zh` for `zh-CN` and `zh_Hans`."""
    return language.replace("_", "-").split("-")[0].lower() if language else None


def words(text: str) -> list[str]:
    """The lower-cased runs of letters, digits and combining marks; each Han or Kana character by itself.

    For ASCII text these are the tokens of the ROUGE package. Combining marks count as parts of words, which `\\w` does
    not grant: without them Hindi or Thai words would fall apart at every vowel sign.
    """
    text = unicodedata.normalize("NFC", text).lower()
    spaced = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in text)
    return split_unspaced(spaced)


def split_unspaced(text: str) -> list[str]:
    """`text` at its spaces, and each Han or Kana character by itself."""
    return _UNSPACED.sub(r" \1 ", text).split()


def normalise_answer(text: str, language: str | None) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no English articles, single spaces.

    Source: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016). Differences: every
    Unicode punctuation mark goes, not just ASCII's. Articles go only from English and from text of unknown language:
    `an` is a German preposition, `a` a Spanish one. A step that would leave nothing is not taken, since otherwise an
    empty prediction would be right where the answer is the option `A` or the sign `-`.
    """
    spaced = " ".join(unicodedata.normalize("NFC", text).lower().split())
    plain = "".join(char for char in spaced if not _is_punctuation(char))
    plain = " ".join(plain.split()) or spaced
    if language_code(language) not in (None, "en"):
        return plain
    return " ".join(_ENGLISH_ARTICLES.sub(" ", plain).split()) or plain


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")
