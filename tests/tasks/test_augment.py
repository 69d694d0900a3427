"""More training examples: what changes in a prompt, how often, from which seed, and what a function may return."""

import random
import re

import pytest
from datasets import Dataset

from pipeline.tasks import TaskError
from pipeline.tasks.augment import AugmentConfig, augment_examples, growth_factor, source_noise, word_dropout

SOURCE = "ten small dogs run over the green field"


@pytest.fixture
def rows():
    prompts = [f"Translate: {SOURCE} {i}\nGerman:" for i in range(40)]
    sources = [f"{SOURCE} {i}" for i in range(40)]
    return Dataset.from_dict(
        {"prompt": prompts, "completion": ["x"] * 40, "references": [["x"]] * 40, "source": sources}
    )


def test_word_dropout_leaves_out_the_share_of_words_that_it_names():
    text = " ".join(["word"] * 2000)
    left = len(word_dropout(text, 0.1, random.Random(0)).split())
    assert abs(left - 1800) < 3 * (2000 * 0.09) ** 0.5 + 1  # three standard deviations
    assert word_dropout("one", 0.999, random.Random(0)) == "one"  # something is left


def test_source_noise_changes_one_letter_of_the_share_of_words_that_it_names():
    noisy = source_noise(" ".join(["abcd"] * 2000), 0.2, random.Random(0)).split()
    changed = [word for word in noisy if word != "abcd"]
    assert abs(len(changed) - 400) < 3 * (2000 * 0.16) ** 0.5
    swapped, dropped, doubled = {"bacd", "acbd", "abdc"}, {"bcd", "acd", "abd"}, {"aabcd", "abbcd", "abccd"}
    assert set(changed) == swapped | dropped | doubled


def test_copies_follow_each_example_and_only_the_field_changes(rows):
    augmented, made_of = augment_examples([AugmentConfig("word_dropout", 0.3, copies=2)], rows, ["source"], seed=0)
    assert made_of == [row for row in range(40) for _ in range(3)] and augmented.column_names == [
        "prompt",
        "completion",
    ]
    assert augmented["prompt"][::3] == rows["prompt"][:]
    copies = [text for i, text in enumerate(augmented["prompt"]) if i % 3]
    assert all(re.fullmatch(r"Translate: .*\nGerman:", text) for text in copies)  # what is not the field stays
    lengths = [len(text.split()) for text in copies]
    assert 7.0 < sum(lengths) / len(lengths) < 9.5  # 9 words, of which 30 % go, and two that stay


def test_the_same_seed_gives_the_same_examples_whatever_other_rows_there_are(rows):
    steps = [AugmentConfig("source_noise", 0.5)]
    once, _ = augment_examples(steps, rows, ["source"], seed=1)
    again, _ = augment_examples(steps, rows.select(range(10)), ["source"], seed=1)
    other, _ = augment_examples(steps, rows, ["source"], seed=2)
    assert once["prompt"][:20] == again["prompt"][:] and once["prompt"][:] != other["prompt"][:]


def test_a_chat_changes_in_the_last_message_of_the_user():
    system = {"role": "system", "content": "a b c d"}
    chat = [system, {"role": "user", "content": "e f"}, {"role": "assistant", "content": "g h"}]
    rows = Dataset.from_dict({"prompt": [[*chat, {"role": "user", "content": "i j k l m n"}]], "completion": ["x"]})
    augmented, _ = augment_examples([AugmentConfig("word_dropout", 0.5)], rows, [], seed=0)
    original, copy = augmented["prompt"]
    assert copy[:3] == original[:3] == chat and len(copy[3]["content"]) < len("i j k l m n")


def both_ways(example):
    """The example, and its two sides exchanged."""
    return [example, {**example, "prompt": example["completion"], "completion": example["source"]}]


def drawn(example, rng):
    return [{**example, "completion": str(rng.random())}] if rng.random() < 0.5 else []


def wrong(example):
    return [{"prompt": ""}]


def failing(example):
    raise KeyError("x")


def test_a_function_takes_the_place_of_each_example(rows):
    augmented, made_of = augment_examples([AugmentConfig(f"{__name__}:both_ways")], rows, [], seed=0)
    assert augmented[1] == {"prompt": "x", "completion": f"{SOURCE} 0"} and made_of[:4] == [0, 0, 1, 1]
    some, made_of = augment_examples([AugmentConfig(f"{__name__}:drawn")], rows, [], seed=0)
    assert 8 <= len(some) == len(set(made_of)) <= 32
    assert some[:] == augment_examples([AugmentConfig(f"{__name__}:drawn")], rows, [], seed=0)[0][:]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong", "must return a list of examples {prompt: a text, completion: a text}"),
        ("failing", "raised KeyError"),
        ("nowhere", "nowhere"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(rows, name, words):
    with pytest.raises(TaskError, match=r"task\.augment") as caught:
        augment_examples([AugmentConfig(f"{__name__}:{name}")], rows, [], seed=0)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "word_droput"}, "did you mean 'word_dropout'"),
        ({"name": "word_dropout", "rate": 1.0}, "rate must be between 0 and 1"),
        ({"name": "word_dropout", "copies": 0}, "copies must be at least 1"),
        ({"name": "my.function", "copies": 2}, "would do nothing"),
    ],
)
def test_steps_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(TaskError, match=r"task\.augment") as caught:
        AugmentConfig(**keys)
    assert words in str(caught.value)


def test_how_many_examples_become_of_one():
    steps = [AugmentConfig("word_dropout", copies=2), AugmentConfig("source_noise")]
    assert growth_factor(steps) == 6 and growth_factor([]) == 1 and growth_factor([AugmentConfig("a.b")]) is None
