"""A generated English-German phrasebook: sentences drawn by chance, for translation without any data.

A sentence is chosen as a `Clause` and then said twice, once by the rules of each language, so the two sides always
mean the same. One English sentence has one German sentence.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from random import Random

from tools.phrasebook import lexicon
from tools.phrasebook.grammar import (
    BE,
    NOTHING,
    Clause,
    Phrase,
    join,
    noun_phrase,
    place_phrase,
    pronoun,
    say_english,
    say_german,
)
from tools.phrasebook.lexicon import Adjective, Noun, Verb

MAX_PAIRS = 50_000
MAX_WORDS = 15
LARGE_NUMBERS = (15, 16, 17, 20, 21, 25, 30, 34, 48, 50, 99, 100)  # few, so that each is met often enough
Maker = Callable[[Random], tuple[str, str]]
MY = ("my", "your", "his", "her", "our")
MODALS = tuple(modal for modal in lexicon.MODALS if modal != "like to")
BEING = lexicon.VERBS["being"][0]
REASONS = frozenset(("sleep", "work", "play", "sing", "study", "get up", "go shopping"))
# A frame is what a verb needs around it, named as in `lexicon.VERBS`.
THINGS = {"lying": "Y", "upright": "Z", "owned": "TVC"}  # the frames whose subject is a thing
ACTIVE = (*(frame for frame, weight in lexicon.FRAME_WEIGHTS.items() for _ in range(weight)), "laying", "standing")
FRAMES = (*ACTIVE, *ACTIVE, "lying", "lying", "upright", "owned", "weather")


@cache
def _nouns(classes: str) -> list[Noun]:
    nouns = [*lexicon.NOUNS, *(place.noun for place in lexicon.PLACES)]
    return [noun for noun in nouns if set(classes) & set(noun.classes)]


@cache
def _adjectives(classes: str) -> list[Adjective]:
    return [adjective for adjective in lexicon.ADJECTIVES if set(classes) & set(adjective.classes)]


def _pick_adjectives(rng: Random, noun: Noun) -> list[Adjective]:
    """None or one, seldom two: a size before a colour."""
    if rng.random() < 0.55:
        return []
    fitting = [a for a in _adjectives(noun.classes) if a.stem not in noun.german.lower()]  # no "junge Jungen"
    sizes = [adjective for adjective in fitting if adjective.english in lexicon.SIZES]
    colours = [adjective for adjective in fitting if adjective.english in lexicon.COLOURS]
    if sizes and colours and rng.random() < 0.2:
        return [rng.choice(sizes), rng.choice(colours)]
    return [rng.choice(fitting)]


def _pick_determiner(rng: Random, noun: Noun, style: str) -> tuple[str | int, bool]:
    """A determiner and whether the noun is plural; `style` is any, definite, indefinite, no or bare."""
    is_person = "P" in noun.classes
    has_plural = noun.english_plural is not None
    plural = has_plural and rng.random() < 0.3
    if style == "no":
        return "no", plural
    if style == "bare":
        return "", has_plural
    if "Q" in noun.classes:
        return rng.choice(MY), plural
    if style == "definite" or (style == "any" and rng.random() < 0.4):
        owned = MY if "p" in noun.classes or not is_person else ("the", "this")
        return rng.choice(("the", "the", "the", "this", rng.choice(owned))), plural
    if noun.is_mass:
        return "", False
    if plural:
        large = rng.randint(2, 12) if is_person else rng.choice(LARGE_NUMBERS)
        return rng.choice(("", "", "many", rng.randint(2, 12), large)), True
    return rng.choice(("a", "a", "a", "a", "every" if is_person and style == "any" else "a")), False


def _phrase_of(rng: Random, noun: Noun, case: str, style: str) -> Phrase:
    determiner, plural = _pick_determiner(rng, noun, style)
    return noun_phrase(determiner, noun, case, plural, _pick_adjectives(rng, noun))


def _plain_phrase(rng: Random, noun: Noun) -> Phrase:
    determiner, plural = _pick_determiner(rng, noun, "definite")
    return noun_phrase(determiner, noun, "nominative", plural)


def _pick_phrase(rng: Random, classes: str, case: str, style: str = "any", avoid: str = "") -> Phrase:
    """A noun phrase whose noun does not occur in the German phrase `avoid`."""
    fitting = [noun for noun in _nouns(classes) if noun.german not in avoid]
    if style in ("no", "indefinite"):  # a relative is always somebody's
        fitting = [noun for noun in fitting if "Q" not in noun.classes]
    return _phrase_of(rng, rng.choice(fitting), case, style)


def _pick_person(rng: Random, case: str, subject: Phrase, style: str = "definite") -> Phrase:
    """Someone who is not the subject, now and then as a pronoun."""
    person = pronoun(rng.randrange(len(lexicon.PRONOUNS)), case)
    same = person.referent == subject.referent or {person.referent, subject.referent} == {0, 4}
    if rng.random() < 0.35 and not same:
        return person
    return _pick_phrase(rng, "P", case, style, avoid=subject.german)


def _pick_subject(rng: Random, frame: str, verb: Verb, style: str = "definite") -> Phrase:
    if frame == "weather":
        return Phrase("it", "es")
    if frame in THINGS:
        return _pick_phrase(rng, THINGS[frame], "nominative", "definite")
    if rng.random() < 0.35:
        return pronoun(rng.randrange(len(lexicon.PRONOUNS)))
    return _pick_phrase(rng, verb.subjects, "nominative", "definite" if rng.random() < 0.6 else style)


def _pick_object(rng: Random, verb: Verb, subject: Phrase, style: str) -> Phrase:
    particle = verb.english.endswith((" up", " on", " off", " away"))  # "picks him up" would part the verb
    if "P" in verb.objects and style != "no" and not particle and rng.random() < 0.5:
        return _pick_person(rng, verb.case, subject, style)
    return _pick_phrase(rng, verb.objects, verb.case, style, avoid=subject.german)


def _pick_place(rng: Random, letters: str, towards: bool = False) -> Phrase:
    if "h" in letters and rng.random() < 0.2:
        return Phrase("home", "nach Hause") if towards else Phrase("at home", "zu Hause")
    place = rng.choice([place for place in lexicon.PLACES if set(place.letter) & set(letters)])
    determiner = rng.choice(("the", "the", "the", "the", "the", "a", "this", "our"))
    return place_phrase(place, towards, determiner, _pick_adjectives(rng, place.noun))


def _pick_relation(rng: Random, classes: str, towards: bool = False) -> Phrase:
    """On, under, behind ... something: the accusative says where it goes, the dative where it is."""
    english, german = rng.choice(lexicon.RELATIONS if classes == "W" else lexicon.RELATIONS[2:])
    phrase = _pick_phrase(rng, classes, "accusative" if towards else "dative", "definite")
    return Phrase(f"{english} {phrase.english}", f"{german} {phrase.german}")


def _pick_complement(rng: Random, frame: str, verb: Verb, subject: Phrase) -> Phrase | None:
    """Where to, where on or about whom, if the frame of the verb asks for it."""
    if frame == "motion":
        by_vehicle = verb.english in ("travel", "come") and rng.random() < 0.4
        place = _pick_place(rng, "c" if by_vehicle else verb.places, towards=True)
        vehicle = Phrase(*rng.choice(lexicon.VEHICLES)) if by_vehicle else NOTHING
        return Phrase(join(place.english, vehicle.english), join(vehicle.german, place.german))
    if frame in ("laying", "standing", "lying", "upright"):
        return _pick_relation(rng, "W", towards=frame in ("laying", "standing"))
    if frame != "prepositional":
        return None
    whom = _pick_object(rng, verb, subject, "definite")
    return Phrase(whom.english, f"{verb.preposition} {whom.german}")


def _pick_setting(rng: Random, frame: str, verb: Verb) -> Phrase | None:
    """The place where it happens: always where the verb cannot do without, otherwise now and then."""
    needed = verb.places.startswith("!")
    if frame == "motion" or not verb.places or (not needed and rng.random() > 0.35):
        return None
    return _pick_relation(rng, "B") if "n" in verb.places and rng.random() < 0.3 else _pick_place(rng, verb.places)


def _pick_clause(rng: Random, frames: Sequence[str], negated: bool = False, style: str = "any") -> Clause:
    """A clause in the simple present; `style` is that of the object, and of the subject unless negated."""
    frame = rng.choice(frames)
    verb = rng.choice(lexicon.VERBS[frame])
    whole = negated or verb.kind == "state"  # "every child does not sleep" would say two things
    subject = _pick_subject(rng, frame, verb, "any" if style == "any" and not whole else "definite")
    if negated:
        style = "no" if frame in ("transitive", "giving") and rng.random() < 0.5 else "definite"
    objects = ()
    if frame in ("giving", "dative", "owned"):
        objects = (_pick_person(rng, "dative", subject),)
    if frame in ("transitive", "giving", "laying", "standing"):
        objects += (_pick_object(rng, verb, subject, style),)
    negation = ("kein" if style == "no" else "nicht") if negated else ""
    complement, place = _pick_complement(rng, frame, verb, subject), _pick_setting(rng, frame, verb)
    return Clause(subject, verb, objects, complement, place, negation=negation)


def _pick_doing(rng: Random, frames: Sequence[str], negated: bool = False, style: str = "any") -> Clause:
    """A clause about something done, not about a state such as knowing or having."""
    while (clause := _pick_clause(rng, frames, negated, style)).verb.kind == "state":
        pass
    return clause


def _pick_time(rng: Random, verb: Verb, negated: bool, kinds: str = "pfhn") -> tuple[str, Phrase] | None:
    """A tense and a time that goes with it; None where the draw does not suit the verb."""
    letters, english, german = rng.choice(lexicon.TIMES)
    kind = rng.choice(letters.removesuffix("!"))
    # "I put on a hat in the morning" could be two tenses; "what do you put on on Mondays" is hard to read.
    unclear = kind == "p" and "h" in letters and verb.past == verb.english.split()[0]
    unclear = unclear or (english.startswith("on ") and verb.english.endswith(" on"))
    if kind not in kinds or (negated and "!" not in letters) or unclear or (kind == "n" and verb.kind != "action"):
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


def _with_modal(rng: Random, clause: Clause, modal: str = "") -> Clause:
    kinds = "h" if modal == "like to" else "fhn"
    timing = _pick_time(rng, clause.verb, bool(clause.negation), kinds) if rng.random() < 0.7 else None
    return replace(clause, modal=modal or rng.choice(MODALS), time=timing[1] if timing else None)


def _declare(rng: Random, clause: Clause) -> tuple[str, str]:
    """Both sides of a statement; a time in front turns the German subject and verb round."""
    if clause.time and rng.random() < 0.5:
        rest = replace(clause, time=None)
        return say_english(rest, clause.time.english), say_german(rest, clause.time.german)
    return say_english(clause), say_german(clause)


def _ask(clause: Clause, front: Phrase) -> tuple[str, str]:
    return say_english(clause, front.english, question=True), say_german(clause, front.german, "question")


def _statement(rng: Random) -> tuple[str, str]:
    return _declare(rng, _with_time(rng, _pick_clause(rng, FRAMES)))


def _negation(rng: Random) -> tuple[str, str]:
    return _declare(rng, _with_time(rng, _pick_clause(rng, FRAMES, negated=True)))


def _modal(rng: Random) -> tuple[str, str]:
    return _declare(rng, _with_modal(rng, _pick_doing(rng, ACTIVE, negated=rng.random() < 0.25)))


def _liking(rng: Random) -> tuple[str, str]:
    """Who "likes to read books" in German "liest gern Bücher"."""
    while True:
        clause = _pick_doing(rng, ("transitive", "intransitive"), style="bare")
        if clause.verb.kind == "action" and "P" not in clause.verb.objects:
            return _declare(rng, _with_modal(rng, clause, "like to"))


def _question(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.3:
        return _ask(_with_modal(rng, _pick_doing(rng, ACTIVE)), NOTHING)
    return _ask(_with_time(rng, _pick_clause(rng, FRAMES)), NOTHING)


def _who(rng: Random) -> tuple[str, str]:
    clause = replace(_with_time(rng, _pick_clause(rng, ACTIVE)), subject=Phrase("who", "wer"))
    return say_english(clause), say_german(clause)


def _what(rng: Random) -> tuple[str, str]:
    """What, which or how many: the object goes in front."""
    while set("PA") & set((clause := _pick_clause(rng, ("transitive",), style="definite")).verb.objects):
        pass
    noun = rng.choice(_nouns(clause.verb.objects))
    fronts = [Phrase("what", "was"), noun_phrase("which", noun, "accusative", False, _pick_adjectives(rng, noun))]
    if noun.english_plural:
        things = noun_phrase("", noun, "accusative", True, _pick_adjectives(rng, noun))
        fronts.append(Phrase(f"how many {things.english}", f"wie viele {things.german}"))
    return _ask(_with_time(rng, replace(clause, objects=())), rng.choice(fronts))


def _where(rng: Random) -> tuple[str, str]:
    frame, german = rng.choice((("intransitive", "wo"), ("motion", "wohin")))
    clause = _pick_clause(rng, (frame,), style="definite")
    while not clause.verb.places or clause.verb.english in ("come", "return"):
        clause = _pick_clause(rng, (frame,), style="definite")
    clause = _with_time(rng, replace(clause, complement=None, place=None))
    return _ask(replace(clause, adverb=None), Phrase("where", german))


def _when_why(rng: Random) -> tuple[str, str]:
    clause = _with_time(rng, _pick_doing(rng, ACTIVE, style="definite"))
    if clause.tense in ("past", "future") and rng.random() < 0.6:
        return _ask(replace(clause, time=None), Phrase("when", "wann"))
    return _ask(clause, Phrase("why", "warum"))


def _is(
    subject: Phrase, adjective: Adjective, degree: Phrase = NOTHING, tense: str = "simple", time: Phrase | None = None
) -> Clause:
    if degree.german == "nicht":
        predicate, negation = Phrase(adjective.english, adjective.german), "nicht"
    else:
        words = (join(degree.english, adjective.english), join(degree.german, adjective.german))
        predicate, negation = Phrase(*words), ""
    return Clause(subject, BEING, complement=predicate, tense=tense, time=time, negation=negation)


def _feeling(rng: Random) -> tuple[str, str]:
    degree, adjective = Phrase(*rng.choice(lexicon.DEGREES)), rng.choice(_adjectives("S"))
    tense, time = _pick_time(rng, BEING, negated=True) or ("simple", None)
    someone = rng.choice(_nouns("P"))
    subject = _plain_phrase(rng, someone) if rng.random() < 0.65 else pronoun(rng.randrange(len(lexicon.PRONOUNS)))
    return _declare(rng, _is(subject, adjective, degree, tense, time))


def _quality(rng: Random) -> tuple[str, str]:
    degree, adjective = Phrase(*rng.choice(lexicon.DEGREES)), rng.choice(lexicon.ADJECTIVES)
    noun = rng.choice(_nouns(adjective.classes))
    return _declare(rng, _is(_plain_phrase(rng, noun), adjective, degree))


def _comparison(rng: Random) -> tuple[str, str]:
    adjective = rng.choice([adjective for adjective in lexicon.ADJECTIVES if adjective.english_comparative])
    letter = rng.choice([letter for letter in adjective.classes if letter not in "SU"])
    first, second = (_plain_phrase(rng, noun) for noun in rng.sample(_nouns(letter), 2))
    english = f"{first.english} {BE[first.person]} {adjective.english_comparative} than {second.english}"
    ist = lexicon.PRESENT["sein"][first.person]
    return english, f"{first.german} {ist} {adjective.german_comparative} als {second.german}"


def _existence(rng: Random) -> tuple[str, str]:
    """A building "gibt es" (with the accusative) in a town; people and animals "are" somewhere."""
    letters, classes = rng.choice((("c", "B"), ("nc", "A"), ("ntc", "P")))
    place = _pick_place(rng, letters)
    thing = _pick_phrase(rng, classes, "accusative" if classes == "B" else "nominative", "indefinite")
    verb = "gibt es" if classes == "B" else lexicon.PRESENT["sein"][thing.person]
    return f"there {BE[thing.person]} {thing.english} {place.english}", f"{place.german} {verb} {thing.german}"


def _condition(rng: Random, main: Clause, tense: str) -> Clause:
    """A short clause about the weather, about how the subject of `main` feels, what it must do, or someone else."""
    kind = rng.random()
    if kind < 0.2:
        return replace(_pick_clause(rng, ("weather",)), tense=tense)
    verb = rng.choice([v for v in lexicon.VERBS["intransitive"] if v.english in REASONS and v != main.verb])
    if kind > 0.7 or main.subject.referent is None:
        other = _pick_phrase(rng, "P", "nominative", "definite", avoid=main.subject.german)
        return Clause(other, verb, tense=tense)
    same = pronoun(main.subject.referent)
    if kind > 0.5 and tense != "past":
        return Clause(same, verb, modal=rng.choice(("have to", "want to")))
    states = [adjective for adjective in _adjectives("S") if adjective.english not in main.subject.english]
    return _is(same, rng.choice(states), tense=tense)


def _because(rng: Random) -> tuple[str, str]:
    main = _with_time(rng, _pick_doing(rng, ACTIVE, negated=rng.random() < 0.3))
    reason = _condition(rng, main, "progressive" if main.tense == "future" else main.tense)
    english, german = _declare(rng, main)
    return f"{english} because {say_english(reason)}", f"{german}, weil {say_german(reason, order='sub')}"


def _if(rng: Random) -> tuple[str, str]:
    """In front, the condition counts as the first part of the German sentence."""
    main = replace(_pick_doing(rng, ACTIVE, negated=rng.random() < 0.2, style="definite"), tense="future")
    if rng.random() < 0.3:
        main = replace(main, tense="simple", modal=rng.choice(MODALS))
    condition = _condition(rng, main, "simple")
    english, german = say_english(condition), say_german(condition, order="sub")
    if rng.random() < 0.5:
        return f"if {english}, {say_english(main)}", say_german(main, f"wenn {german},")
    return f"{say_english(main)} if {english}", f"{say_german(main)}, wenn {german}"


def _reported(rng: Random) -> tuple[str, str]:
    """What somebody says or asks, with the German verb at the end."""
    frame, english, german = rng.choice((("saying", "that", "dass"), ("asking", "whether", "ob")))
    verb = rng.choice(lexicon.VERBS[frame])
    outer = Clause(_pick_subject(rng, frame, verb), verb)
    negated = frame == "saying" and rng.random() < 0.2
    if rng.random() < 0.3:
        inner = _with_modal(rng, _pick_doing(rng, ACTIVE, negated))
    else:
        inner = _with_time(rng, _pick_clause(rng, FRAMES, negated))
    return (
        f"{say_english(outer)} {english} {say_english(inner)}",
        f"{say_german(outer)}, {german} {say_german(inner, order='sub')}",
    )


# What makes a sentence of each kind, and how often.
STATEMENTS: dict[Maker, int] = {
    _statement: 30,
    _negation: 10,
    _modal: 12,
    _liking: 3,
    _feeling: 2,
    _quality: 2,
    _comparison: 3,
    _existence: 3,
    _because: 5,
    _if: 4,
    _reported: 4,
}
QUESTIONS: dict[Maker, int] = {_question: 8, _who: 3, _what: 4, _where: 3, _when_why: 4}
MAKERS = (*STATEMENTS, *QUESTIONS)
WEIGHTS = (*STATEMENTS.values(), *QUESTIONS.values())


def draw_pair(rng: Random) -> tuple[str, str]:
    """One English sentence and its German, capitalised and with its final mark."""
    make = rng.choices(MAKERS, WEIGHTS)[0]
    english, german = make(rng)
    mark = "?" if make in QUESTIONS else "."
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
        short = max(len(english.split()), len(german.split())) <= MAX_WORDS
        if short and english not in pairs and german not in said:
            pairs[english] = german
            said.add(german)
    # Short sentences run out first: shuffle, or the end of the list would be harder than its beginning.
    result = list(pairs.items())
    rng.shuffle(result)
    return result
