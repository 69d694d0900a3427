"""A small grammar of English and German: a `Clause` says the same in both, each by the rules of its own language."""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.phrasebook import lexicon
from tools.phrasebook.lexicon import Adjective, Determiner, Noun, Place, Verb

BE = ("am", "are", "is", "are", "are", "are")
WAS = ("was", "were", "was", "were", "were", "were")
PLURAL_PERSON = 5


@dataclass(frozen=True)
class Phrase:
    """The same words in both languages; `person` picks the verb form, `referent` the pronoun that refers back."""

    english: str
    german: str
    person: int = 2
    referent: int | None = None
    is_pronoun: bool = False


NOTHING = Phrase("", "")


@dataclass(frozen=True)
class Clause:
    """What is said. `complement` is a direction, a preposition phrase or a predicate; `place` is where it happens.

    `tense` is simple, progressive, future (all three the German present) or past (the German perfect). `negation` is
    "" or "nicht", or "kein" where the object already carries it.
    """

    subject: Phrase
    verb: Verb
    objects: tuple[Phrase, ...] = ()
    complement: Phrase | None = None
    place: Phrase | None = None
    tense: str = "simple"
    time: Phrase | None = None
    adverb: Phrase | None = None
    modal: str = ""
    negation: str = ""


def join(*words: str) -> str:
    """The words that are not empty, with a space between them."""
    return " ".join(word for word in words if word)


def english_number(number: int) -> str:
    """A number from 0 to 100 in words."""
    if number < 20:
        return lexicon.ENGLISH_UNITS[number]
    tens, units = divmod(number, 10)
    if tens == 10:
        return "a hundred"
    return lexicon.ENGLISH_TENS[tens] + (f"-{lexicon.ENGLISH_UNITS[units]}" if units else "")


def german_number(number: int) -> str:
    """A number from 0 to 100 in words: the units come first."""
    if number < 20:
        return lexicon.GERMAN_UNITS[number]
    tens, units = divmod(number, 10)
    if tens == 10:
        return "hundert"
    return (f"{lexicon.GERMAN_UNITS[units]}und" if units else "") + lexicon.GERMAN_TENS[tens]


def _german_noun(noun: Noun, case: str, plural: bool) -> str:
    if plural:
        form = noun.german_plural or noun.german
        return form + "n" if case == "dative" and form[-1] not in "ns" else form
    return noun.german_plural if noun.weak and case != "nominative" and noun.german_plural else noun.german


def _english_article(determiner: str | int, noun: Noun, plural: bool, first: str) -> str:
    if isinstance(determiner, int):
        return english_number(determiner)
    if determiner == "a" or (determiner == "no" and not plural and not noun.is_mass):
        return "an" if first[0] in "aeiou" else "a"
    return {"no": "any", "this": "these" if plural else "this"}.get(determiner, determiner)


def noun_phrase(
    determiner: str | int,
    noun: Noun,
    case: str = "nominative",
    plural: bool = False,
    adjectives: Sequence[Adjective] = (),
) -> Phrase:
    """A noun with its article and adjectives; `determiner` is a key of `lexicon.DETERMINERS` or a number."""
    if isinstance(determiner, int):
        rules = Determiner(german_number(determiner), lexicon.INVARIABLE, lexicon.STRONG)
    else:
        rules = lexicon.DETERMINERS[determiner]
    gender, row = "p" if plural else noun.gender, lexicon.CASES.index(case)
    endings = rules.adjective[gender][row]
    german = [rules.stem + rules.article[gender][row], *(adjective.stem + endings for adjective in adjectives)]
    name = noun.english_plural if plural and noun.english_plural else noun.english
    english = [*(adjective.english for adjective in adjectives), name]
    article = _english_article(determiner, noun, plural, english[0])
    referent = PLURAL_PERSON if plural else {"m": 2, "f": 3, "n": None}[noun.gender] if "P" in noun.classes else None
    return Phrase(
        english=join(article, *english),
        german=join(*german, _german_noun(noun, case, plural)),
        person=PLURAL_PERSON if plural else 2,
        referent=referent,
    )


def pronoun(index: int, case: str = "nominative") -> Phrase:
    """The personal pronoun at `index` of `lexicon.PRONOUNS`."""
    subject, other, *german, person = lexicon.PRONOUNS[index]
    english = subject if case == "nominative" else other
    return Phrase(english, german[lexicon.CASES.index(case)], person, index, is_pronoun=True)


def place_phrase(
    place: Place, towards: bool = False, determiner: str = "the", adjectives: Sequence[Adjective] = ()
) -> Phrase:
    """Where something is (dative) or where it goes (accusative, but "zu" has the dative); "in dem" becomes "im"."""
    preposition = place.german_to if towards else place.german_at
    case = "accusative" if towards and preposition != "zu" else "dative"
    phrase = noun_phrase(determiner, place.noun, case, adjectives=adjectives)
    article, rest = phrase.german.split(" ", 1)
    start = f"{preposition} {article}"
    english = place.english_to if towards else place.english_at
    return Phrase(f"{english} {phrase.english}", f"{lexicon.CONTRACTIONS.get(start, start)} {rest}")


def conjugate(verb: Verb, person: int) -> str:
    """The German present tense without the separable prefix; `person` counts ich, du, er, wir, ihr, sie from 0."""
    if verb.german in lexicon.PRESENT:
        return lexicon.PRESENT[verb.german][person]
    if person in (3, 5):
        return verb.german
    if person == 2:
        return verb.third
    if person == 1:
        stem = verb.third[:-1]
        return stem + ("t" if stem[-1] in "sßzx" else "st")
    stem = verb.german.removesuffix("n").removesuffix("e")
    return stem + "e" if person == 0 else lexicon.regular_t(stem)


def _english_finite(head: str, person: int) -> str:
    if person != 2:
        return head
    if head == "have":
        return "has"
    if head[-1] == "y" and head[-2] not in "aeiou":
        return head[:-1] + "ies"
    return head + ("es" if head.endswith(("s", "sh", "ch", "x", "o")) else "s")


def _english_group(clause: Clause, support: bool) -> tuple[str, str]:
    """The word that moves and takes "not", and the rest of the verb; `support` asks for "do" where there is none."""
    verb, person, past = clause.verb, clause.subject.person, clause.tense == "past"
    head, *tail = [*clause.modal.split(), *verb.english.split()]
    if clause.tense == "future":
        return "will", join(head, *tail)
    if head == "be":  # never "is being tired"
        return (WAS if past else BE)[person], join(*tail)
    if clause.tense == "progressive":
        return BE[person], join(verb.ing, *tail)
    if head in ("can", "should", "would"):
        return head, join(*tail)
    if support:
        return "did" if past else "does" if person == 2 else "do", join(head, *tail)
    return "", join(verb.past if past else _english_finite(head, person), *tail)


def say_english(clause: Clause, front: str = "", question: bool = False) -> str:
    """The English words of a clause; `front` is a fronted time or question word."""
    operator, rest = _english_group(clause, support=question or bool(clause.negation))
    if clause.negation and not question:
        operator = "cannot" if operator == "can" else f"{operator} not"
    subject = clause.subject.english
    start = [operator, subject] if question else [subject, operator]
    tail = [part.english for part in (*clause.objects, clause.complement, clause.place, clause.time) if part]
    return join(front, *start, clause.adverb.english if clause.adverb else "", rest, *tail)


def _german_group(clause: Clause) -> tuple[str, str]:
    """The finite verb and what closes the clause: a prefix, a participle or an infinitive."""
    verb, person = clause.verb, clause.subject.person
    forms = lexicon.MODALS.get(clause.modal)
    if forms:
        return forms[person], verb.prefix + verb.german
    if clause.tense != "past":
        return conjugate(verb, person), verb.prefix
    if verb.german in lexicon.PRETERITE:
        return lexicon.PRETERITE[verb.german][person], ""
    auxiliary = ("habe", "hast", "hat", "haben", "habt", "haben")
    return (lexicon.PRESENT["sein"] if verb.auxiliary == "sein" else auxiliary)[person], verb.participle


def _german_middle(clause: Clause) -> list[str]:
    """What stands behind the subject and the pronouns: time, place, objects, complement, and where "nicht" goes."""
    time, place, complement = (part.german if part else "" for part in (clause.time, clause.place, clause.complement))
    objects = [part.german for part in clause.objects if not part.is_pronoun]
    adverb = "gern" if clause.modal == "like to" else clause.adverb.german if clause.adverb else ""
    if clause.negation == "nicht" and not complement:
        return [time, adverb, *objects, "nicht", place]
    return [time, adverb, place, *objects, "nicht" if clause.negation == "nicht" else "", complement]


def say_german(clause: Clause, front: str = "", order: str = "main") -> str:
    """The German words of a clause: verb second after `front` or the subject, first in a "question", last if "sub"."""
    finite, bracket = _german_group(clause)
    subject = clause.subject.german
    middle = _german_middle(clause)
    pronouns = [part.german for part in clause.objects if part.is_pronoun]
    if order == "main" and not front:
        return join(subject, finite, *pronouns, *middle, bracket)
    # A pronoun comes before a noun, even before the subject, unless it could be taken for the subject.
    ahead = not clause.subject.is_pronoun and "sie" not in pronouns
    core = [*pronouns, subject, *middle] if ahead else [subject, *pronouns, *middle]
    if order == "sub":
        is_prefix = bracket and bracket == clause.verb.prefix
        return join(*core, *([bracket + finite] if is_prefix else [bracket, finite]))
    return join(front, finite, *core, bracket)
