"""A generated English-German phrasebook: a small grammar of both languages, for translation without any data.

A sentence is chosen as a `Clause` and then said twice, once by the rules of each language, so the two sides always
mean the same. One English sentence has one German sentence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from pipeline.tasks import lexicon
from pipeline.tasks.lexicon import Adjective, Determiner, Noun, Place, Verb

MAX_PAIRS = 50_000
MY = ("my", "your", "his", "her", "our")
BE = ("am", "are", "is", "are", "are", "are")
WAS = ("was", "were", "was", "were", "were", "were")
PLURAL_PERSON = 5
THINGS = {"lying": "Y", "upright": "Z", "owned": "TVC"}  # frames whose subject is a thing
ACTIVE = (
    *("transitive",) * 8,
    *("dative",) * 2,
    *("giving",) * 3,
    *("prepositional",) * 2,
    *("intransitive",) * 3,
    *("motion",) * 3,
    "laying",
    "standing",
)
FRAMES = (*ACTIVE, *ACTIVE, "lying", "lying", "upright", "owned", "weather")
MODALS = tuple(modal for modal in lexicon.MODALS if modal != "like to")


@dataclass(frozen=True)
class Phrase:
    """The same words in both languages; `person` picks the verb form, `referent` the pronoun that refers back."""

    english: str
    german: str
    person: int = 2
    referent: int | None = None
    is_pronoun: bool = False


@dataclass(frozen=True)
class Clause:
    """What is said. `complement` is what German puts behind "nicht": a place, a preposition phrase, a predicate.

    `tense` is simple, progressive, future (all three the German present) or past (the German perfect). `negation` is
    "" or "nicht", or "kein" where the object already carries it.
    """

    subject: Phrase
    verb: Verb
    objects: tuple[Phrase, ...] = ()
    complement: Phrase | None = None
    tense: str = "simple"
    time: Phrase | None = None
    adverb: Phrase | None = None
    modal: str = ""
    negation: str = ""


def _join(*words: str) -> str:
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
    english = [
        *(adjective.english for adjective in adjectives),
        (noun.english_plural if plural else None) or noun.english,
    ]
    article = _english_article(determiner, noun, plural, english[0])
    referent = PLURAL_PERSON if plural else {"m": 2, "f": 3, "n": None}[noun.gender] if "P" in noun.classes else None
    return Phrase(
        english=_join(article, *english),
        german=_join(*german, _german_noun(noun, case, plural)),
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
    return stem + ("e" if person == 0 else "et" if stem[-1] in "dt" else "t")


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
    if clause.tense == "progressive":
        return BE[person], _join(verb.ing, *tail)
    if clause.tense == "future":
        return "will", _join(head, *tail)
    if head == "be":
        return (WAS if past else BE)[person], _join(*tail)
    if head in ("can", "should", "would"):
        return head, _join(*tail)
    if support:
        return "did" if past else "does" if person == 2 else "do", _join(head, *tail)
    return "", _join(verb.past if past else _english_finite(head, person), *tail)


def say_english(clause: Clause, front: str = "", question: bool = False) -> str:
    """The English words of a clause; `front` is a fronted time or question word."""
    operator, rest = _english_group(clause, support=question or bool(clause.negation))
    if clause.negation and not question:
        operator = "cannot" if operator == "can" else f"{operator} not"
    subject = clause.subject.english
    start = [operator, subject] if question else [subject, operator]
    tail = [part.english for part in (*clause.objects, clause.complement, clause.time) if part]
    return _join(front, *start, clause.adverb.english if clause.adverb else "", rest, *tail)


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


def say_german(clause: Clause, front: str = "", order: str = "main") -> str:
    """The German words of a clause: verb second after `front` or the subject, first in a "question", last if "sub"."""
    finite, bracket = _german_group(clause)
    light = [part.german for part in clause.objects if part.is_pronoun]
    heavy = [part.german for part in clause.objects if not part.is_pronoun]
    adverb = "gern" if clause.modal == "like to" else clause.adverb.german if clause.adverb else ""
    middle = [*light, clause.time.german if clause.time else "", adverb, *heavy]
    middle += ["nicht" if clause.negation == "nicht" else "", clause.complement.german if clause.complement else ""]
    subject = clause.subject.german
    if order == "sub":
        is_prefix = bracket and bracket == clause.verb.prefix
        return _join(subject, *middle, *([bracket + finite] if is_prefix else [bracket, finite]))
    start = [front, finite, subject] if front or order == "question" else [subject, finite]
    return _join(*start, *middle, bracket)


@cache
def _nouns(classes: str) -> list[Noun]:
    nouns = [*lexicon.NOUNS, *(place.noun for place in lexicon.PLACES)]
    return [noun for noun in nouns if set(classes) & set(noun.classes)]


@cache
def _adjectives(classes: str) -> list[Adjective]:
    return [adjective for adjective in lexicon.ADJECTIVES if set(classes) & set(adjective.classes)]


def _pick_adjectives(rng: Random, noun: Noun) -> list[Adjective]:
    """None or one, seldom two: a size before a colour."""
    if rng.random() < 0.55 or not (fitting := _adjectives(noun.classes)):
        return []
    sizes = [adjective for adjective in fitting if adjective.english in lexicon.SIZES]
    colours = [adjective for adjective in fitting if adjective.english in lexicon.COLOURS]
    if sizes and colours and rng.random() < 0.2:
        return [rng.choice(sizes), rng.choice(colours)]
    return [rng.choice(fitting)]


def _pick_determiner(rng: Random, noun: Noun, style: str) -> tuple[str | int, bool]:
    """A determiner and whether the noun is plural; `style` is any, definite, indefinite, no or bare."""
    has_plural = noun.english_plural is not None
    plural = has_plural and rng.random() < 0.3
    if style == "no":
        return "no", plural
    if style == "bare":
        return "", has_plural
    if "Q" in noun.classes:
        return rng.choice(MY), plural
    owned = rng.choice(MY if "p" in noun.classes or "P" not in noun.classes else ("the", "this"))
    definite = rng.choice(("the", "the", "the", "this", owned))
    if style == "definite" or (style == "any" and rng.random() < 0.4):
        return definite, plural
    if noun.is_mass:
        return "", False
    if plural:
        return rng.choice(("", "", "many", rng.randint(2, 12), rng.randint(2, 12), rng.randint(13, 100))), True
    return rng.choice(("a", "a", "a", "a", "every" if "P" in noun.classes else "a")), False


def _pick_phrase(rng: Random, classes: str, case: str, style: str = "any", avoid: str = "") -> Phrase:
    """A noun phrase whose noun does not occur in the German phrase `avoid`."""
    fitting = [noun for noun in _nouns(classes) if noun.german not in avoid]
    if style in ("no", "indefinite"):
        fitting = [noun for noun in fitting if "Q" not in noun.classes]
    return _phrase_of(rng, rng.choice(fitting), case, style)


def _phrase_of(rng: Random, noun: Noun, case: str, style: str) -> Phrase:
    determiner, plural = _pick_determiner(rng, noun, style)
    return noun_phrase(determiner, noun, case, plural, _pick_adjectives(rng, noun))


def _pick_person(rng: Random, case: str, subject: Phrase, style: str = "definite") -> Phrase:
    """Someone who is not the subject, now and then as a pronoun."""
    person = pronoun(rng.randrange(len(lexicon.PRONOUNS)), case)
    same = person.referent == subject.referent or {person.referent, subject.referent} == {0, 4}
    if rng.random() < 0.35 and not same:
        return person
    return _pick_phrase(rng, "P", case, style, avoid=subject.german)


def _pick_place(rng: Random, letters: str, towards: bool = False) -> Phrase:
    if "h" in letters and rng.random() < 0.2:
        return Phrase("home", "nach Hause") if towards else Phrase("at home", "zu Hause")
    place = rng.choice([place for place in lexicon.PLACES if set(place.letter) & set(letters)])
    determiner = rng.choice(("the", "the", "the", "the", "a", "this", "our"))
    return place_phrase(place, towards, determiner, _pick_adjectives(rng, place.noun))


def _pick_relation(rng: Random, classes: str, towards: bool = False) -> Phrase:
    """On, under, behind ... something: the accusative says where it goes, the dative where it is."""
    english, german = rng.choice(lexicon.RELATIONS if classes == "W" else lexicon.RELATIONS[2:])
    phrase = _pick_phrase(rng, classes, "accusative" if towards else "dative", "definite")
    return Phrase(f"{english} {phrase.english}", f"{german} {phrase.german}")


def _pick_time(rng: Random, verb: Verb, negated: bool, kinds: str = "pfhn") -> tuple[str, Phrase] | None:
    """A tense and a time that goes with it; None where the draw does not suit the verb."""
    letters, english, german = rng.choice(lexicon.TIMES)
    kind = rng.choice(letters.removesuffix("!"))
    # "I put on a hat in the morning" would be two tenses in one, as would a progressive "is seeing".
    ambiguous = kind == "p" and "h" in letters and verb.past == verb.english.split()[0]
    if kind not in kinds or (negated and "!" not in letters) or ambiguous or (kind == "n" and verb.kind != "action"):
        return None
    return {"p": "past", "f": "future", "h": "simple", "n": "progressive"}[kind], Phrase(english, german)


def _with_time(rng: Random, clause: Clause) -> Clause:
    """The clause in some tense, with a time, an adverb or neither."""
    verb, negated = clause.verb, bool(clause.negation)
    if verb.kind != "state" and rng.random() < 0.6 and (timing := _pick_time(rng, verb, negated)):
        return replace(clause, tense=timing[0], time=timing[1])
    tenses = ["simple"]
    if verb.past != verb.english.split()[0]:
        tenses.append("past")
    if verb.kind == "action":
        tenses += ["progressive", "progressive"]
    tense = rng.choice(tenses)
    if verb.kind == "action" and tense == "simple" and not negated and rng.random() < 0.6:
        return replace(clause, adverb=Phrase(*rng.choice(lexicon.ADVERBS)))
    return replace(clause, tense=tense)


def _pick_subject(rng: Random, frame: str, verb: Verb, negated: bool) -> Phrase:
    if frame == "weather":
        return Phrase("it", "es")
    if frame in THINGS:
        return _pick_phrase(rng, THINGS[frame], "nominative", "definite")
    if rng.random() < 0.35:
        return pronoun(rng.randrange(len(lexicon.PRONOUNS)))
    style = "definite" if negated or verb.kind == "state" or rng.random() < 0.6 else "any"
    return _pick_phrase(rng, verb.subjects, "nominative", style)


def _pick_object(rng: Random, verb: Verb, subject: Phrase, style: str) -> Phrase:
    particle = verb.english.endswith((" up", " on", " off", " away"))  # "picks him up" would part the verb
    if "P" in verb.objects and style != "no" and not particle and rng.random() < 0.5:
        return _pick_person(rng, "accusative", subject, style)
    return _pick_phrase(rng, verb.objects, "accusative", style, avoid=subject.german)


def _pick_arguments(
    rng: Random, frame: str, verb: Verb, subject: Phrase, style: str
) -> tuple[tuple[Phrase, ...], Phrase | None]:
    """The objects and the complement that the frame of the verb asks for."""
    letters = verb.places.removeprefix("!")
    if frame == "motion":
        place = _pick_place(rng, letters, towards=True)
        vehicle = (
            rng.choice(lexicon.VEHICLES) if verb.english in ("travel", "come") and rng.random() < 0.4 else ("", "")
        )
        return (), Phrase(_join(place.english, vehicle[0]), _join(vehicle[1], place.german))
    if frame in THINGS and frame != "owned":
        return (), _pick_relation(rng, "W")
    place = None
    if letters and (letters != verb.places or rng.random() < 0.35):
        place = _pick_relation(rng, "B") if "n" in letters and rng.random() < 0.3 else _pick_place(rng, letters)
    if frame in ("laying", "standing"):
        return (_pick_phrase(rng, verb.objects, "accusative", style),), _pick_relation(rng, "W", towards=True)
    if frame == "transitive":
        return (_pick_object(rng, verb, subject, style),), place
    if frame in ("dative", "owned"):
        return (_pick_person(rng, "dative", subject),), place
    if frame == "giving":
        return (_pick_person(rng, "dative", subject), _pick_phrase(rng, verb.objects, "accusative", style)), None
    if frame == "prepositional":
        whom = (
            _pick_person(rng, verb.case, subject)
            if "P" in verb.objects
            else _pick_phrase(rng, verb.objects, verb.case, "definite")
        )
        where = (place.english, place.german) if place else ("", "")
        return (), Phrase(_join(whom.english, where[0]), _join(verb.preposition, whom.german, where[1]))
    return (), place


def _pick_clause(rng: Random, frames: Sequence[str], negated: bool = False, style: str = "any") -> Clause:
    """A clause in the present without a time."""
    frame = rng.choice(frames)
    verb = rng.choice(lexicon.VERBS[frame])
    subject = _pick_subject(rng, frame, verb, negated)
    if negated:
        style = "no" if frame in ("transitive", "giving") and rng.random() < 0.5 else "definite"
    objects, complement = _pick_arguments(rng, frame, verb, subject, style)
    negation = ("kein" if style == "no" else "nicht") if negated else ""
    return Clause(subject, verb, objects, complement, negation=negation)


def _declare(rng: Random, clause: Clause) -> tuple[str, str]:
    """Both sides of a statement, with the time in front or not: in front it turns the German subject and verb round."""
    if clause.time and rng.random() < 0.5:
        rest = replace(clause, time=None)
        return say_english(rest, clause.time.english), say_german(rest, clause.time.german)
    return say_english(clause), say_german(clause)


def _statement(rng: Random) -> tuple[str, str]:
    return _declare(rng, _with_time(rng, _pick_clause(rng, FRAMES)))


def _negation(rng: Random) -> tuple[str, str]:
    return _declare(rng, _with_time(rng, _pick_clause(rng, FRAMES, negated=True)))


def _pick_modal(rng: Random, negated: bool) -> Clause:
    clause = _pick_clause(rng, ACTIVE, negated)
    while clause.verb.kind == "state":
        clause = _pick_clause(rng, ACTIVE, negated)
    timing = _pick_time(rng, clause.verb, negated, "fhn") if rng.random() < 0.6 else None
    return replace(clause, modal=rng.choice(MODALS), time=timing[1] if timing else None)


def _modal(rng: Random) -> tuple[str, str]:
    return _declare(rng, _pick_modal(rng, negated=rng.random() < 0.25))


def _liking(rng: Random) -> tuple[str, str]:
    """ "likes to eat" is "isst gern"."""
    clause = _pick_clause(rng, ("transitive", "intransitive"), style="bare")
    while clause.verb.kind != "action" or any(thing.is_pronoun for thing in clause.objects):
        clause = _pick_clause(rng, ("transitive", "intransitive"), style="bare")
    timing = _pick_time(rng, clause.verb, False, "h") if rng.random() < 0.8 else None
    return _declare(rng, replace(clause, modal="like to", time=timing[1] if timing else None))


def _question(rng: Random) -> tuple[str, str]:
    clause = _pick_modal(rng, False) if rng.random() < 0.3 else _with_time(rng, _pick_clause(rng, FRAMES))
    return say_english(clause, question=True), say_german(clause, order="question")


def _who(rng: Random) -> tuple[str, str]:
    clause = replace(_with_time(rng, _pick_clause(rng, ACTIVE)), subject=Phrase("who", "wer"))
    return say_english(clause), say_german(clause)


def _what(rng: Random) -> tuple[str, str]:
    """What, which or how many: the object goes in front."""
    clause = _pick_clause(rng, ("transitive",), style="definite")
    while set("PA") & set(clause.verb.objects):
        clause = _pick_clause(rng, ("transitive",), style="definite")
    noun = rng.choice(_nouns(clause.verb.objects))
    fronts = [Phrase("what", "was"), noun_phrase("which", noun, "accusative", False, _pick_adjectives(rng, noun))]
    if noun.english_plural:
        things = noun_phrase("", noun, "accusative", True, _pick_adjectives(rng, noun))
        fronts.append(Phrase(f"how many {things.english}", f"wie viele {things.german}"))
    return _ask(_with_time(rng, replace(clause, objects=())), rng.choice(fronts))


def _where(rng: Random) -> tuple[str, str]:
    frame = rng.choice(("intransitive", "motion"))
    clause = _pick_clause(rng, (frame,))
    while not clause.complement:
        clause = _pick_clause(rng, (frame,))
    german = "wohin" if frame == "motion" else "wo"
    return _ask(_with_time(rng, replace(clause, complement=None)), Phrase("where", german))


def _when_why(rng: Random) -> tuple[str, str]:
    clause = _with_time(rng, _pick_clause(rng, ACTIVE))
    if clause.tense in ("past", "future") and rng.random() < 0.6:
        return _ask(replace(clause, time=None), Phrase("when", "wann"))
    return _ask(clause, Phrase("why", "warum"))


def _ask(clause: Clause, front: Phrase) -> tuple[str, str]:
    return say_english(clause, front.english, question=True), say_german(clause, front.german)


def _is(subject: Phrase, english: str, german: str, **details: object) -> Clause:
    return Clause(subject, lexicon.VERBS["being"][0], complement=Phrase(english, german), **details)


def _state(rng: Random, subject: Phrase, tense: str = "simple", degree: tuple[str, str] = ("", "")) -> Clause:
    adjective = rng.choice(_adjectives("S"))
    return _is(subject, _join(degree[0], adjective.english), _join(degree[1], adjective.german), tense=tense)


def _predicate(rng: Random) -> tuple[str, str]:
    degree = rng.choice(lexicon.DEGREES)
    if rng.random() < 0.4:
        subject = _pick_subject(rng, "being", lexicon.VERBS["being"][0], negated=True)
        clause = _state(rng, subject, degree=degree)
        timing = _pick_time(rng, clause.verb, True)
        return _declare(rng, replace(clause, tense=timing[0], time=timing[1]) if timing else clause)
    adjective = rng.choice(lexicon.ADJECTIVES)
    noun = rng.choice(_nouns(adjective.classes))
    subject = noun_phrase(*_pick_determiner(rng, noun, "definite")[:1], noun)
    return _declare(rng, _is(subject, _join(degree[0], adjective.english), _join(degree[1], adjective.german)))


def _comparison(rng: Random) -> tuple[str, str]:
    adjective = rng.choice([adjective for adjective in lexicon.ADJECTIVES if adjective.english_comparative])
    letter = rng.choice([letter for letter in adjective.classes if letter not in "SU"])
    first, second = (_phrase_of(rng, noun, "nominative", "definite") for noun in rng.sample(_nouns(letter), 2))
    english, german = adjective.english_comparative, adjective.german_comparative
    return _declare(rng, _is(first, f"{english} than {second.english}", f"{german} als {second.german}"))


def _existence(rng: Random) -> tuple[str, str]:
    """ "Es gibt" takes the accusative; people and animals rather "are" somewhere."""
    letters, classes = rng.choice((("c", "B"), ("nhs", "A"), ("ntc", "P")))
    place = _pick_place(rng, letters)
    case = "accusative" if classes == "B" else "nominative"
    thing = _pick_phrase(rng, classes, case, "indefinite")
    several = thing.person == PLURAL_PERSON
    verb = "gibt es" if classes == "B" else "sind" if several else "ist"
    english = f"there {'are' if several else 'is'} {thing.english} {place.english}"
    return english, f"{place.german} {verb} {thing.german}"


def _because(rng: Random) -> tuple[str, str]:
    """The reason ends with its verb."""
    main = _pick_clause(rng, ACTIVE, negated=rng.random() < 0.3)
    while main.verb.kind == "state":
        main = _pick_clause(rng, ACTIVE)
    main = _with_time(rng, main)
    past = main.tense == "past"
    reason = _condition(rng, main.subject, "past" if past else "simple")
    english, german = _declare(rng, main)
    return f"{english} because {say_english(reason)}", f"{german}, weil {say_german(reason, order='sub')}"


def _condition(rng: Random, subject: Phrase, tense: str) -> Clause:
    """A short clause about the weather, about how the subject feels, what it must do, or what someone else does."""
    kind = rng.random()
    if kind < 0.2:
        return replace(_pick_clause(rng, ("weather",)), tense=tense)
    if kind < 0.7 and subject.referent is not None:
        same = pronoun(subject.referent)
        if kind < 0.5 or tense == "past":
            return _state(rng, same, tense)
        verb = rng.choice([verb for verb in lexicon.VERBS["intransitive"] if verb.places[:1] != "!"])
        return Clause(same, verb, modal=rng.choice(("have to", "want to")))
    verb = rng.choice([verb for verb in lexicon.VERBS["intransitive"] if verb.places[:1] != "!"])
    return Clause(_pick_phrase(rng, "P", "nominative", "definite"), verb, tense=tense)


def _if(rng: Random) -> tuple[str, str]:
    """In front, the condition counts as the first part of the German sentence."""
    main = replace(_pick_clause(rng, ACTIVE, negated=rng.random() < 0.2), tense="future")
    if rng.random() < 0.3:
        main = replace(main, tense="simple", modal=rng.choice(MODALS))
    condition = _condition(rng, main.subject, "simple")
    english, german = say_english(condition), say_german(condition, order="sub")
    if rng.random() < 0.5:
        return f"if {english}, {say_english(main)}", say_german(main, f"wenn {german},")
    return f"{say_english(main)} if {english}", f"{say_german(main)}, wenn {german}"


def _that(rng: Random) -> tuple[str, str]:
    """ "says that", "asks whether", "does not know whether" and a clause with its verb at the end."""
    asking = rng.random() < 0.4
    verb = rng.choice(lexicon.VERBS["asking"] if asking else lexicon.VERBS["saying"])
    outer = Clause(_pick_subject(rng, "saying", verb, negated=True), verb)
    if rng.random() < 0.3:
        inner = _pick_modal(rng, negated=rng.random() < 0.2)
    else:
        inner = _with_time(rng, _pick_clause(rng, FRAMES, negated=not asking and rng.random() < 0.2))
    english, german = ("whether", "ob") if asking else ("that", "dass")
    inner_german = say_german(inner, order="sub")
    return f"{say_english(outer)} {english} {say_english(inner)}", f"{say_german(outer)}, {german} {inner_german}"


# What a sentence of each kind is made by, how often, and how it ends.
KINDS: tuple[tuple[Callable[[Random], tuple[str, str]], int, str], ...] = (
    (_statement, 30, "."),
    (_negation, 10, "."),
    (_modal, 12, "."),
    (_liking, 3, "."),
    (_question, 8, "?"),
    (_who, 3, "?"),
    (_what, 4, "?"),
    (_where, 3, "?"),
    (_when_why, 4, "?"),
    (_predicate, 4, "."),
    (_comparison, 3, "."),
    (_existence, 3, "."),
    (_because, 5, "."),
    (_if, 4, "."),
    (_that, 4, "."),
)
_WEIGHTS = [weight for _, weight, _ in KINDS]


def draw_pair(rng: Random) -> tuple[str, str]:
    """One English sentence and its German, capitalised and with its final mark."""
    make, _, mark = rng.choices(KINDS, weights=_WEIGHTS)[0]
    english, german = make(rng)
    return english[0].upper() + english[1:] + mark, german[0].upper() + german[1:] + mark


def phrase_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` distinct (English, German) sentence pairs in random order, the same for the same seed.

    No English sentence and no German sentence occurs twice, so the list can be cut into splits that share nothing.

    Raises:
        ValueError: `count` is negative or more than MAX_PAIRS.
    """
    if not 0 <= count <= MAX_PAIRS:
        raise ValueError(f"the phrasebook has up to {MAX_PAIRS} sentence pairs; {count} were asked for")
    rng = Random(seed)
    pairs: dict[str, str] = {}
    said: set[str] = set()
    while len(pairs) < count:
        english, german = draw_pair(rng)
        if english not in pairs and german not in said:
            pairs[english] = german
            said.add(german)
    # Short sentences run out first: shuffle, or the end of the list would be harder than its beginning.
    result = list(pairs.items())
    rng.shuffle(result)
    return result
