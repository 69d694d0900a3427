"""The phrasebook: its German by hand-written examples, its pairs by what a translation task needs of them."""

import random
from pathlib import Path

import pytest

from tools.phrasebook import lexicon
from tools.phrasebook.__main__ import main
from tools.phrasebook.grammar import (
    Clause,
    Phrase,
    conjugate,
    english_number,
    german_number,
    noun_phrase,
    place_phrase,
    pronoun,
    say_english,
    say_german,
)
from tools.phrasebook.sentences import MAX_PAIRS, MAX_WORDS, draw_pair, phrase_pairs

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "phrasebook"
TOMORROW, YESTERDAY = Phrase("tomorrow", "morgen"), Phrase("yesterday", "gestern")
ICH, DU, ER, SIE, WIR, THEY = (pronoun(index) for index in range(6))


def noun(english: str) -> lexicon.Noun:
    return next(entry for entry in lexicon.NOUNS if entry.english == english)


def adjective(english: str) -> lexicon.Adjective:
    return next(entry for entry in lexicon.ADJECTIVES if entry.english == english)


def verb(english: str, frame: str = "transitive") -> lexicon.Verb:
    return next(entry for entry in lexicon.VERBS[frame] if entry.english == english)


def place(english: str) -> lexicon.Place:
    return next(entry for entry in lexicon.PLACES if entry.noun.english == english)


def phrase(determiner: str | int, *words: str, case: str = "nominative", plural: bool = False) -> Phrase:
    *adjectives, name = words
    return noun_phrase(determiner, noun(name), case, plural, [adjective(word) for word in adjectives])


OLD_WOMAN = phrase("the", "old", "woman")
RED_APPLE = phrase("a", "red", "apple", case="accusative")
LONG_LETTER = phrase("the", "long", "letter", case="accusative")
SMALL_CHILD = phrase("the", "small", "child", case="dative")


@pytest.mark.parametrize(
    ("determiner", "words", "case", "plural", "english", "german"),
    [
        ("the", "old man", "nominative", False, "the old man", "der alte Mann"),
        ("the", "old man", "accusative", False, "the old man", "den alten Mann"),
        ("the", "old man", "dative", False, "the old man", "dem alten Mann"),
        ("the", "old man", "dative", True, "the old men", "den alten Männern"),
        ("the", "new car", "accusative", False, "the new car", "das neue Auto"),
        ("the", "red car", "nominative", True, "the red cars", "die roten Autos"),
        ("the", "red car", "dative", True, "the red cars", "den roten Autos"),
        ("the", "old woman", "dative", False, "the old woman", "der alten Frau"),
        ("a", "old man", "nominative", False, "an old man", "ein alter Mann"),
        ("a", "red apple", "accusative", False, "a red apple", "einen roten Apfel"),
        ("a", "apple", "accusative", False, "an apple", "einen Apfel"),
        ("a", "red car", "nominative", False, "a red car", "ein rotes Auto"),
        ("a", "young woman", "dative", False, "a young woman", "einer jungen Frau"),
        ("a", "small child", "dative", False, "a small child", "einem kleinen Kind"),
        ("no", "red car", "accusative", True, "any red cars", "keine roten Autos"),
        ("no", "apple", "accusative", False, "an apple", "keinen Apfel"),
        ("no", "cold milk", "accusative", False, "any cold milk", "keine kalte Milch"),
        ("my", "old friend", "nominative", False, "my old friend", "mein alter Freund"),
        ("our", "old friend", "accusative", False, "our old friend", "unseren alten Freund"),
        ("this", "expensive coat", "nominative", False, "this expensive coat", "dieser teure Mantel"),
        ("this", "sour apple", "dative", True, "these sour apples", "diesen sauren Äpfeln"),
        ("every", "tired nurse", "nominative", False, "every tired nurse", "jede müde Krankenschwester"),
        ("which", "book", "accusative", False, "which book", "welches Buch"),
        ("many", "old man", "dative", True, "many old men", "vielen alten Männern"),
        ("", "fresh bread", "accusative", False, "fresh bread", "frisches Brot"),
        ("", "hot coffee", "accusative", False, "hot coffee", "heißen Kaffee"),
        ("", "red apple", "accusative", True, "red apples", "rote Äpfel"),
        (3, "red apple", "accusative", True, "three red apples", "drei rote Äpfel"),
        (21, "red apple", "dative", True, "twenty-one red apples", "einundzwanzig roten Äpfeln"),
        ("the", "big white car", "accusative", False, "the big white car", "das große weiße Auto"),
        ("the", "small boy", "accusative", False, "the small boy", "den kleinen Jungen"),
        ("a", "neighbour", "dative", False, "a neighbour", "einem Nachbarn"),
        ("a", "student", "nominative", False, "a student", "ein Student"),
    ],
)
def test_noun_phrase(determiner: str | int, words: str, case: str, plural: bool, english: str, german: str) -> None:
    said = phrase(determiner, *words.split(), case=case, plural=plural)
    assert (said.english, said.german) == (english, german)


def test_numbers() -> None:
    assert [german_number(n) for n in (2, 12, 16, 17, 30, 21, 67, 100)] == (
        ["zwei", "zwölf", "sechzehn", "siebzehn", "dreißig", "einundzwanzig", "siebenundsechzig", "hundert"]
    )
    assert [english_number(n) for n in (2, 15, 40, 99, 100)] == ["two", "fifteen", "forty", "ninety-nine", "a hundred"]


def test_place_phrases_take_the_dative_for_where_and_the_accusative_for_where_to() -> None:
    garden, old = place("garden"), [adjective("old")]
    assert place_phrase(garden) == Phrase("in the garden", "im Garten")
    assert place_phrase(garden, towards=True) == Phrase("into the garden", "in den Garten")
    assert place_phrase(garden, determiner="our", adjectives=old).german == "in unserem alten Garten"
    assert place_phrase(place("office"), towards=True).german == "ins Büro"
    assert place_phrase(place("station"), towards=True, adjectives=old) == Phrase(
        "to the old station", "zum alten Bahnhof"
    )
    assert place_phrase(place("school"), towards=True).german == "zur Schule"
    assert place_phrase(place("market"), determiner="a").german == "auf einem Markt"


@pytest.mark.parametrize(
    ("english", "frame", "forms"),
    [
        ("buy", "transitive", "kaufe kaufst kauft kaufen kauft kaufen"),
        ("read", "transitive", "lese liest liest lesen lest lesen"),
        ("eat", "transitive", "esse isst isst essen esst essen"),
        ("see", "transitive", "sehe siehst sieht sehen seht sehen"),
        ("wash", "transitive", "wasche wäschst wäscht waschen wascht waschen"),
        ("have", "transitive", "habe hast hat haben habt haben"),
        ("find", "transitive", "finde findest findet finden findet finden"),
        ("open", "transitive", "öffne öffnest öffnet öffnen öffnet öffnen"),
        ("feed", "transitive", "füttere fütterst füttert füttern füttert füttern"),
        ("invite", "transitive", "lade lädst lädt laden ladet laden"),
        ("give", "giving", "gebe gibst gibt geben gebt geben"),
        ("work", "intransitive", "arbeite arbeitest arbeitet arbeiten arbeitet arbeiten"),
        ("dance", "intransitive", "tanze tanzt tanzt tanzen tanzt tanzen"),
        ("live", "intransitive", "wohne wohnst wohnt wohnen wohnt wohnen"),
        ("drive", "motion", "fahre fährst fährt fahren fahrt fahren"),
        ("know", "saying", "weiß weißt weiß wissen wisst wissen"),
        ("be", "being", "bin bist ist sind seid sind"),
    ],
)
def test_present_tense(english: str, frame: str, forms: str) -> None:
    assert " ".join(conjugate(verb(english, frame), person) for person in range(6)) == forms


def test_the_verb_comes_second_also_after_a_time_in_front() -> None:
    clause = Clause(OLD_WOMAN, verb("buy"), (RED_APPLE,), tense="future")
    assert say_english(clause, "tomorrow") == "tomorrow the old woman will buy a red apple"
    assert say_german(clause, "morgen") == "morgen kauft die alte Frau einen roten Apfel"
    assert say_german(Clause(OLD_WOMAN, verb("buy"), (RED_APPLE,), time=TOMORROW)) == (
        "die alte Frau kauft morgen einen roten Apfel"
    )


def test_a_modal_verb_sends_the_infinitive_to_the_end() -> None:
    clause = Clause(phrase("the", "teacher"), verb("read"), (LONG_LETTER,), modal="want to")
    assert say_english(clause, "today") == "today the teacher wants to read the long letter"
    assert say_german(clause, "heute") == "heute will der Lehrer den langen Brief lesen"
    separable = Clause(DU, verb("call"), (pronoun(2, "accusative"),), modal="have to", negation="nicht")
    assert say_english(separable) == "you do not have to call him"
    assert say_german(separable) == "du musst ihn nicht anrufen"


def test_the_past_is_a_perfect_with_haben_or_sein() -> None:
    bought = Clause(phrase("the", "cook"), verb("buy"), (RED_APPLE,), tense="past")
    assert say_english(bought, "yesterday") == "yesterday the cook bought a red apple"
    assert say_german(bought, "gestern") == "gestern hat der Koch einen roten Apfel gekauft"
    towards = place_phrase(place("garden"), towards=True)
    went = Clause(WIR, verb("go", "motion"), complement=towards, tense="past", time=YESTERDAY)
    assert say_english(went) == "we went into the garden yesterday"
    assert say_german(went) == "wir sind gestern in den Garten gegangen"
    assert say_german(Clause(ICH, verb("be", "being"), complement=Phrase("tired", "müde"), tense="past")) == (
        "ich war müde"
    )


def test_a_separable_prefix_goes_to_the_end_and_joins_a_verb_that_is_there() -> None:
    clause = Clause(ER, verb("call"), (pronoun(3, "accusative"),), tense="progressive")
    assert (say_english(clause), say_german(clause)) == ("he is calling her", "er ruft sie an")
    assert say_german(clause, order="sub") == "er sie anruft"
    assert say_german(Clause(SIE, verb("go shopping", "intransitive"), time=TOMORROW)) == "sie kauft morgen ein"
    assert say_german(Clause(THEY, verb("call"), (LONG_LETTER,), tense="past")).endswith("angerufen")


def test_subordinate_clauses_end_with_the_finite_verb() -> None:
    clause = Clause(OLD_WOMAN, verb("read"), (LONG_LETTER,), time=TOMORROW)
    assert say_german(clause, order="sub") == "die alte Frau morgen den langen Brief liest"
    past = Clause(OLD_WOMAN, verb("read"), (LONG_LETTER,), tense="past")
    assert say_german(past, order="sub") == "die alte Frau den langen Brief gelesen hat"
    modal = Clause(OLD_WOMAN, verb("read"), (LONG_LETTER,), modal="can")
    assert say_german(modal, order="sub") == "die alte Frau den langen Brief lesen kann"


def test_objects_and_pronouns() -> None:
    clause = Clause(OLD_WOMAN, verb("give", "giving"), (SMALL_CHILD, RED_APPLE))
    assert say_english(clause) == "the old woman gives the small child a red apple"
    assert say_german(clause) == "die alte Frau gibt dem kleinen Kind einen roten Apfel"
    to_me = Clause(OLD_WOMAN, verb("give", "giving"), (pronoun(0, "dative"), RED_APPLE), tense="future")
    assert say_english(to_me, "tomorrow") == "tomorrow the old woman will give me a red apple"
    assert say_german(to_me, "morgen") == "morgen gibt mir die alte Frau einen roten Apfel"


def test_where_nicht_stands() -> None:
    letter = Clause(ER, verb("read"), (LONG_LETTER,), tense="progressive", negation="nicht")
    assert (say_english(letter), say_german(letter)) == (
        "he is not reading the long letter",
        "er liest den langen Brief nicht",
    )
    sleep = Clause(DU, verb("sleep", "intransitive"), place=place_phrase(place("garden")), negation="nicht")
    assert (say_english(sleep), say_german(sleep)) == ("you do not sleep in the garden", "du schläfst nicht im Garten")
    kein = Clause(DU, verb("have"), (phrase("no", "car", case="accusative"),), negation="kein")
    assert (say_english(kein), say_german(kein)) == ("you do not have a car", "du hast kein Auto")


def test_questions() -> None:
    clause = Clause(SIE, verb("read"), (LONG_LETTER,), time=TOMORROW, tense="future")
    assert say_english(clause, question=True) == "will she read the long letter tomorrow"
    assert say_german(clause, order="question") == "liest sie morgen den langen Brief"
    what = Clause(phrase("the", "cook"), verb("buy"), tense="past")
    assert say_english(what, "what", question=True) == "what did the cook buy"
    assert say_german(what, "was", "question") == "was hat der Koch gekauft"


def test_liking_to_is_gern() -> None:
    clause = Clause(ER, verb("read"), (phrase("", "book", case="accusative", plural=True),), modal="like to")
    assert (say_english(clause), say_german(clause)) == ("he likes to read books", "er liest gern Bücher")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return phrase_pairs(5000, seed=0)


def test_the_same_seed_gives_the_same_pairs_whatever_the_global_state() -> None:
    random.seed(1)
    first = phrase_pairs(300, seed=7)
    random.seed(2)
    state = random.getstate()
    assert phrase_pairs(300, seed=7) == first
    assert random.getstate() == state
    assert set(phrase_pairs(300, seed=8)) != set(first)


def test_no_sentence_of_either_language_occurs_twice(pairs: list[tuple[str, str]]) -> None:
    assert len(pairs) == len({english for english, _ in pairs}) == len({german for _, german in pairs}) == 5000


def test_one_english_sentence_has_one_german_sentence() -> None:
    rng = random.Random(3)
    said: dict[str, str] = {}
    for english, german in (draw_pair(rng) for _ in range(10000)):
        assert said.setdefault(english, german) == german


@pytest.mark.parametrize("count", [-1, MAX_PAIRS + 1])
def test_a_count_that_cannot_be_made_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"up to {MAX_PAIRS} sentence pairs; {count} were asked for"):
        phrase_pairs(count, seed=0)


def test_no_pairs() -> None:
    assert phrase_pairs(0, seed=0) == []


def test_every_sentence_is_written_like_one(pairs: list[tuple[str, str]]) -> None:
    for sentence in (side for pair in pairs for side in pair):
        assert sentence[0].isupper(), sentence
        assert sentence[-1] in ".?", sentence
        assert sentence == " ".join(sentence.split()), sentence
        assert sentence.replace(",", "").replace("-", "").replace(" ", "")[:-1].isalpha(), sentence
    assert all(english[-1] == german[-1] for english, german in pairs)


def test_lengths_vary_around_seven_words(pairs: list[tuple[str, str]]) -> None:
    lengths = [len(german.split()) for _, german in pairs]
    assert 6.5 < sum(lengths) / len(lengths) < 8.5
    assert min(lengths) <= 3
    assert 13 <= max(lengths) <= MAX_WORDS


def test_copying_the_english_words_gives_nothing(pairs: list[tuple[str, str]]) -> None:
    shared = total = 0
    for english, german in pairs:
        source, target = english[:-1].lower().split(), german[:-1].lower().replace(",", "").split()
        shared += sum(word in source for word in target)
        total += len(target)
    assert shared / total < 0.05


def test_german_nouns_are_capitalised(pairs: list[tuple[str, str]]) -> None:
    names = {form for entry in lexicon.NOUNS for form in (entry.german, entry.german_plural) if form}
    lowered = {name.lower() for name in names} - {"junge", "jungen"}  # also forms of "jung"
    assert not any(word in lowered for _, german in pairs for word in german[:-1].split())


def test_the_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    main([str(tmp_path)])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in SHIPPED.iterdir()}
    for suffix in ("en", "de"):  # nothing that is tested was trained on
        lines = b"".join(written[f"{split}.{suffix}"] for split in ("train", "validation", "test")).splitlines()
        assert len(lines) == len(set(lines)) == 10_256
