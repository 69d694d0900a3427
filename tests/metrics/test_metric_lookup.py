"""Finding a metric by its name."""

from dataclasses import dataclass

import pytest

from pipeline.metrics import METRIC_NAMES, load_metric


@dataclass(frozen=True)
class Length:
    """A user's own metric, as one class."""

    unit: str = "characters"
    name: str = "length"
    higher_is_better: bool = True

    @property
    def signature(self):
        return f"unit:{self.unit}"

    def sample_scores(self, predictions, references):
        return [float(len(prediction)) for prediction in predictions]

    def resampled_scores(self, predictions, references, indices):
        raise NotImplementedError

    def corpus_score(self, predictions, references, n_bootstrap=1000, confidence=0.95, seed=0):
        raise NotImplementedError


def shortest(**options):
    return Length(**options)


class NoMetric:
    """A class without the methods of a metric."""


NUMBER = 3


def test_dotted_path_of_a_class_and_of_a_function_with_options():
    assert load_metric(f"{__name__}.Length").sample_scores(["abc"], [["x"]]) == [3.0]
    assert load_metric(f"{__name__}.shortest", unit="words").signature == "unit:words"


@pytest.mark.parametrize(("name", "meant"), [("blue", "bleu"), ("BLEU", "bleu"), ("rougel", "rougeL"), ("f1", None)])
def test_unknown_name_lists_the_known_ones(name, meant):
    with pytest.raises(ValueError, match=f"unknown metric '{name}'") as caught:
        load_metric(name)
    assert all(known in str(caught.value) for known in METRIC_NAMES)
    assert (f"did you mean '{meant}'?" in str(caught.value)) == (meant is not None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_package.Thing", {}, "cannot import .*no_such_package.*there are: bleu, chrf"),
        (f"{__name__}.Missing", {}, "cannot import .*Missing"),
        (".relative", {}, "cannot import"),
        (f"{__name__}.Length", {"colour": "red"}, "cannot be called with the options .*colour"),
        (f"{__name__}.NUMBER", {}, "cannot be called"),
        (f"{__name__}.NoMetric", {}, "gave a NoMetric, which is no metric: it needs name, signature"),
    ],
)
def test_dotted_path_that_gives_no_metric(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_metric(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bleu", {"tokenizer": "13a"}, "metric bleu: unknown option 'tokenizer'; did you mean 'tokenize'"),
        ("bleu", {"lowercase": "yes"}, "option 'lowercase' must be bool, found 'yes'"),
        ("bleu", {"tokenize": "14a"}, "unknown tokenizer '14a'; there are: none, zh, 13a"),
        ("bleu", {"smooth_method": "laplace"}, "unknown smooth_method 'laplace'; there are: none, floor, add-k, exp"),
        ("chrf", {"word_order": True}, "option 'word_order' must be int, found True"),
        ("bleu", {"max_ngram_order": 0}, "metric bleu: option 'max_ngram_order' must be at least 1, found 0"),
        ("chrf", {"char_order": 0}, "metric chrf: option 'char_order' must be at least 1, found 0"),
        ("chrf", {"word_order": -1}, "metric chrf: option 'word_order' must be at least 0, found -1"),
        ("exact_match", {"lowercase": True}, "unknown option 'lowercase'; it has no options"),
        ("rougeL", {"use_stemer": True}, "metric rougeL: unknown option 'use_stemer'; did you mean 'use_stemmer'"),
    ],
)
def test_wrong_option_says_what_would_be_right(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_metric(name, **options)
