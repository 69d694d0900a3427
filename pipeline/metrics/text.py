"""Words and normalised answers, for every script."""

import re
import string
import unicodedata
from functools import cache

from langcodes import Language, LanguageTagError

# Scripts without spaces between words: here a character counts as a word, with the marks that belong to it (as in the
# evaluation scripts of CMRC 2018 and MLQA, for Han). Kana and Han; Thai and Lao; Tibetan; Myanmar; Khmer.
_UNSPACED_RANGES = (
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
    (0x0E01, 0x0EFF),
    (0x0F00, 0x0FFF),
    (0x1000, 0x109F),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0x1780, 0x17FF),
)
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my", "bo", "dz"})
# Signs of numbers, which make them other numbers: a minus in front, and what stands between two digits.
_NUMBER_SIGNS = re.compile(r"(?<!\w)[-\u2212](?=\d)|(?<=\d)[.,/](?=\d)")
_PLAIN_SIGNS = {"\u2212": "-", ",": "."}
_THOUSANDS = {sign: re.compile(rf"(?<=\d)(?<!\b0)[{sign}](?=\d{{3}}(?!\d))") for sign in (",", ".,")}
ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _unspaced_pattern() -> re.Pattern[str]:
    spans = "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED_RANGES)
    codes = (code for first, last in _UNSPACED_RANGES if last < 0x20000 for code in range(first, last + 1))
    marks = "".join(char for char in map(chr, codes) if unicodedata.category(char).startswith("M"))
    return re.compile(f"([{spans}][{marks}]*)")


_UNSPACED = _unspaced_pattern()


@cache
def language_code(language: str | None) -> str | None:
    """Return the code of a language: `zh` for `zh-CN`, `zho_Hans`, `cmn` and `Chinese`, `de` for `deu_Latn`.

    Understood are tags of ISO 639 and BCP 47, with `-` or `_`, English names of about 100 languages, and the codes of
    countries that are no language's (`cn`, `jp`). A part of a macrolanguage counts as the whole (`arb` is `ar`).

    Raises:
        ValueError: none of these.
    """
    if language is None:
        return None
    try:
        tag = Language.get(language)
        if tag.language and Language.make(tag.language).is_valid():
            return tag.prefer_macrolanguage().language
    except LanguageTagError:
        pass
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # slow to import, rarely needed

    if language.lower() in TO_LANGUAGE_CODE:
        return TO_LANGUAGE_CODE[language.lower()]
    if len(language) == 2 and language.isalpha():
        spoken = Language.make(territory=language.upper()).maximize()
        if spoken.language not in (None, "und", "en"):  # en is also the answer for countries that do not exist
            return spoken.language
    raise ValueError(
        f"task.language: {language!r} is no language; write a code of ISO 639 or BCP 47, such as de, pt-BR or zho_Hans"
    )


def words(text: str) -> list[str]:
    """Return the lower-cased runs of letters, digits and combining marks; see `split_unspaced`.

    For ASCII text these are the tokens of the ROUGE package. Combining marks count as parts of words, which `\\w` does
    not grant: without them Hindi or Thai words would fall apart at every vowel sign.
    """
    text = unicodedata.normalize("NFC", text).lower()
    spaced = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in text)
    return split_unspaced(spaced)


def split_unspaced(text: str) -> list[str]:
    """Split at spaces, and split scripts without spaces (Han, Kana, Thai, Lao, Khmer, ...) into characters."""
    return _UNSPACED.sub(r" \1 ", text).split()


def normalise_answer(text: str, language: str | None) -> str:
    """Normalise an answer as SQuAD does: lower case, no punctuation, no English articles, single spaces.

    Source: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (2016). Differences: every
    Unicode punctuation mark goes, not just ASCII's, but not the signs of numbers: -5, 3.5 (also written 3,5) and 1/2
    are not 5, 35 and 12. Commas between thousands go, outside English points too. Articles go only from English and
    from text of unknown language: `an` is a German preposition, `a` a Spanish one. A step that would leave nothing is
    not taken, since otherwise an empty prediction would be right where the answer is the option `A` or the sign `-`.
    """
    spaced = " ".join(unicodedata.normalize("NFC", text).lower().split())
    is_english = language_code(language) in (None, "en")
    grouped = _THOUSANDS["," if is_english else ".,"].sub("", spaced)
    signs = {match.start(): _PLAIN_SIGNS.get(match[0], match[0]) for match in _NUMBER_SIGNS.finditer(grouped)}
    plain = "".join(signs.get(i, "" if _is_punctuation(char) else char) for i, char in enumerate(grouped))
    plain = " ".join(plain.split()) or spaced
    if not is_english:
        return plain
    return " ".join(ENGLISH_ARTICLES.sub(" ", plain).split()) or plain


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")
