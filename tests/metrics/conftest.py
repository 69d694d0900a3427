"""A small corpus with everything that is awkward: umlauts, several references, empty texts, repeated words."""

import pytest

EXAMPLES = [
    ("the cat sat on mats", ["the cat sat on the mat", "a cat lay on mats"]),
    (
        "Für Übermut büßt man häufig.",
        ["Für Übermut büßt man oft.", "Übermut tut selten gut.", "Hochmut kommt zu Fall."],
    ),
    ("", ["an empty prediction has no words"]),
    ("so much text for so little", [""]),
    ("Completely right, word for word.", ["Completely right, word for word."]),
    ("one two three four five six", ["six five four three two one", "one two three four five"]),
    ("yes yes yes yes yes yes yes", ["yes"]),
    ("He said: no!", ["She said: maybe.", "He said nothing at all."]),
]


@pytest.fixture
def corpus() -> tuple[list[str], list[list[str]]]:
    """Eight predictions and their references, one to three for each."""
    return [prediction for prediction, _ in EXAMPLES], [list(texts) for _, texts in EXAMPLES]
