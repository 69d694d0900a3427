"""ROUGE, exact match and token F1: by hand, and against rouge_score on English."""

import math
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from pipeline.metrics import load_metric
from pipeline.metrics.rouge import UnicodeTokenizer
from pipeline.metrics.text import language_code, normalise_answer, words

PREDICTION, REFERENCE = "the cat on a mat", "the cat sat on the mat"


@pytest.mark.parametrize(("name", "expected"), [("rouge1", 8 / 11), ("rouge2", 2 / 9), ("rougeL", 8 / 11)])
def test_rouge_by_hand(name, expected):
    """5 words against 6, of which 4 are shared, in this order: 2 x 4 / 11. 4 pairs against 5, 1 shared: 2 / 9."""
    metric = load_metric(name)
    assert metric.sample_scores([PREDICTION], [[REFERENCE]]) == pytest.approx([expected])
    score = metric.corpus_score([PREDICTION, "no"], [[REFERENCE], ["yes"]], n_bootstrap=0)
    assert score.value == pytest.approx(100 * expected / 2)


def test_rouge_l_minds_the_order_and_rouge_1_does_not():
    """`c b a` against `a b c`: all words, but only one of them in order: 2 x 1 / 6."""
    assert load_metric("rouge1").sample_scores(["c b a"], [["a b c"]]) == pytest.approx([1.0])
    assert load_metric("rougeL").sample_scores(["c b a"], [["a b c"]]) == pytest.approx([1 / 3])


def test_rouge_takes_the_best_reference():
    references = ["nothing of that", REFERENCE, "a dog"]
    assert load_metric("rougeL").sample_scores([PREDICTION], [references]) == pytest.approx([8 / 11])


def test_rouge_knows_umlauts():
    """`für` is one word. Cut into `f` and `r`, as rouge_score's own tokenizer does, `fär` would match it fully."""
    metric = load_metric("rouge1", "de")
    assert metric.sample_scores(["Für Größe"], [["für größe"]]) == pytest.approx([1.0])
    assert metric.sample_scores(["fär"], [["für"]]) == [0.0]
    assert RougeScorer(["rouge1"]).score("für", "fär")["rouge1"].fmeasure == 1.0
    assert words("u\u0308ber") == words("über") == ["über"]  # decomposed and composed


def test_words_of_other_scripts():
    assert words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]
    assert words("Ελλάδα, Україна — 42!") == ["ελλάδα", "україна", "42"]
    assert words("我很好。") == ["我", "很", "好"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("กินข้าว", ["กิ", "น", "ข้", "า", "ว"]),  # Thai: a vowel or tone mark above belongs to its consonant
        ("ກິນເຂົ້າ", ["ກິ", "ນ", "ເ", "ຂົ້", "າ"]),
        ("បាយឆា", ["បា", "យ", "ឆា"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("abc กิน", ["abc", "กิ", "น"]),
    ],
)
def test_scripts_without_spaces_fall_into_characters(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("language", ["th", "lo", "km", "my", "zh", "yue"])
@pytest.mark.parametrize("metric", ["bleu", "ter", "rouge1", "rougeL", "token_f1"])
def test_a_character_that_is_missing_costs_little_in_a_language_without_spaces(metric, language):
    """One of 8 characters is missing. As one word, without spaces, the text would score 0."""
    text = {"th": "กขคงจฉชซ", "lo": "ກຂຄງຈຊຍດ", "km": "កខគឃងចឆជ", "my": "ကခဂဃငစဆဇ"}.get(language, "我喜欢和朋友吃饭")
    score = load_metric(metric, language).sample_scores([text[:-1]], [[text]])[0]
    assert score >= 0.8 if metric != "bleu" else score == pytest.approx(math.exp(-1 / 7), abs=1e-6)
    assert load_metric(metric, language).sample_scores([text], [[text]]) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("de", "de"),
        ("pt-BR", "pt"),
        ("zh_Hans", "zh"),
        ("zho_Hans", "zh"),
        ("cmn", "zh"),
        ("deu_Latn", "de"),
        ("arb_Arab", "ar"),
        ("mya_Mymr", "my"),
        ("en_XX", "en"),
        ("Chinese", "zh"),
        ("german", "de"),
        ("cn", "zh"),
        ("jp", "ja"),
        (None, None),
    ],
)
def test_languages_by_their_codes_and_names(tag, code):
    assert language_code(tag) == code


@pytest.mark.parametrize("tag", ["klingon", "xx", "", "und", "../x", "english please"])
@pytest.mark.parametrize("metric", ["bleu", "ter", "rouge1", "token_f1", "exact_match"])
def test_what_is_no_language_is_refused(metric, tag):
    with pytest.raises(ValueError, match=r"task\.language: .* no language"):
        load_metric(metric, tag)


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_english_tokens_are_those_of_rouge_score(use_stemmer):
    text = (
        "The runners' snake_case tests -- running, ran (2nd time) -- weren't FLYING; e.g. ponies" + string.punctuation
    )
    ours = UnicodeTokenizer(DefaultTokenizer(use_stemmer)._stemmer)
    assert ours.tokenize(text) == DefaultTokenizer(use_stemmer).tokenize(text)


def test_stemmer_is_for_english_only():
    assert load_metric("rouge1", "en", use_stemmer=True).sample_scores(["running"], [["runs"]]) == pytest.approx([1.0])
    assert load_metric("rouge1", "en").sample_scores(["running"], [["runs"]]) == [0.0]
    assert "stem:porter" in load_metric("rouge1", use_stemmer=True).signature
    with pytest.raises(ValueError, match=r"metric rouge2: use_stemmer is for English only, .* 'de'"):
        load_metric("rouge2", "de", use_stemmer=True)


@pytest.mark.parametrize(
    ("prediction", "references", "language", "expected"),
    [
        ("The  Eiffel Tower!", ["eiffel tower"], None, 1.0),
        ("The Eiffel Tower", ["eiffel tower"], "fr", 0.0),
        ("„Größe“ – ja…", ["größe ja"], "de", 1.0),
        ("an", ["auf", "an"], "de", 1.0),
        ("an Bord", ["Bord"], "de", 0.0),
        ("nearly right", ["right", "quite right"], "en", 0.0),
        ("A", ["a"], "en", 1.0),
        ("", ["A"], "en", 0.0),
        ("the", ["A"], "en", 0.0),
        ("+", ["-"], "en", 0.0),
        ("-", ["-"], "en", 1.0),
        ("U\u0308ber", ["über"], "de", 1.0),
        ("-5", ["5"], None, 0.0),
        ("(\u22125)", ["-5."], None, 1.0),
        ("A-5", ["A5"], None, 1.0),
        ("3.5", ["35"], None, 0.0),
        ("3,5", ["3.5"], "de", 1.0),
        ("1/2", ["12"], None, 0.0),
        ("1,234,000.5", ["1234000.5"], None, 1.0),
        ("3.125", ["3125"], "en", 0.0),
        ("0,125", ["0.125"], "en", 1.0),
        ("1.000,5", ["1000,5"], "de", 1.0),
        ("1999.", ["in 1999, or", "1999"], None, 1.0),
    ],
)
def test_exact_match(prediction, references, language, expected):
    assert load_metric("exact_match", language).sample_scores([prediction], [references]) == [expected]


def test_normalised_answer():
    assert normalise_answer(" The cat's, an¿ 3.5%  A-team ", "en") == "cats 3.5 ateam"
    assert normalise_answer(string.punctuation + "x", None) == "x"


def test_token_f1_by_hand():
    """`the quick fox` is 2 words, its article gone, against 3, of which 2 are shared: 2 x 2 / 5 (German: / 6)."""
    prediction, reference = "the quick fox", "quick brown fox."
    assert load_metric("token_f1").sample_scores([prediction], [[reference]]) == pytest.approx([0.8])
    assert load_metric("token_f1", "de").sample_scores([prediction], [[reference]]) == pytest.approx([2 / 3])


def test_token_f1_counts_repetitions_once_each_and_takes_the_best_reference():
    """`no no no` shares one word with `no way`: 2 x 1 / 5; two with `no no`: 2 x 2 / 5."""
    metric = load_metric("token_f1")
    assert metric.sample_scores(["no no no"], [["no way"]]) == pytest.approx([0.4])
    assert metric.sample_scores(["no no no"], [["no way", "no no"]]) == pytest.approx([0.8])


def test_token_f1_splits_chinese_into_characters():
    assert load_metric("token_f1", "zh").sample_scores(["我很好。"], [["你很好"]]) == pytest.approx([2 / 3])
