"""Texts for people."""

import pytest

from pipeline.runtime.messages import yaml_text
from pipeline.trainers.ppo.config import PPOConfig


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (0.5, "0.5"), ("k1", "'k1'"), ((1, "a", False), "[1, 'a', false]")],
)
def test_a_value_is_written_as_in_a_recipe(value: object, text: str):
    assert yaml_text(value) == text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sync_ref_model": True, "kl_coef": 0}, "found true"),
        ({"stop_strings": ("", "x")}, "found ['', 'x']"),
        ({"group_baseline": "median"}, "must be one of false, true, mean, found 'median'; did you mean"),
    ],
)
def test_a_refused_setting_shows_no_python(settings: dict, words: str):
    with pytest.raises(ValueError) as error:
        PPOConfig(**settings)
    assert words in str(error.value)
