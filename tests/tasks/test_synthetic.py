"""The embedded task: its splits are apart, and each depends on nothing but the sizes before it and the seed."""

from itertools import combinations

import pytest

from pipeline.tasks import SPLITS, TaskError, load_task, synthetic
from pipeline.tasks.synthetic import Config

SMALL = {"train_examples": 60, "validation_examples": 20, "test_examples": 30}
POOL = synthetic.POOL


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """The pool of the real sizes takes half a second to make."""
    monkeypatch.setattr(synthetic, "POOL", 150)


def test_the_pool_is_that_of_the_default_sizes():
    default = Config()
    assert default.train_examples + default.validation_examples + default.test_examples == POOL


def sentences(**changes):
    """The source sentences of each split."""
    task = load_task("synthetic", Config(**{**SMALL, **changes}))
    return {split: list(getattr(task, split)["source"]) for split in SPLITS}


def test_sizes_columns_and_language():
    task = load_task("synthetic", Config(**SMALL, prompt="Englisch: {source}\n"))
    assert [len(getattr(task, split)) for split in SPLITS] == [60, 20, 30]
    row = task.train[0]
    assert row["prompt"] == f"Englisch: {row['source']}\n"
    assert row["references"] == [row["completion"]] and row["completion"]
    assert task.language == "de"


def test_splits_share_no_sentence_on_either_side():
    task = load_task("synthetic", Config(train_examples=2000, validation_examples=200, test_examples=200))
    for column in ("source", "completion"):
        texts = {split: set(getattr(task, split)[column]) for split in SPLITS}
        assert sum(map(len, texts.values())) == 2400
        assert not any(texts[a] & texts[b] for a, b in combinations(SPLITS, 2))


def test_the_same_seed_gives_the_same_data_and_another_seed_other():
    assert sentences() == sentences()
    first, second = sentences(data_seed=1), sentences(data_seed=2)
    assert first["test"] != second["test"] and len(set(first["test"]) & set(second["test"])) < 15


@pytest.mark.parametrize("train_examples", [10, 200, 1500])
def test_the_training_size_leaves_the_held_out_sentences_alone(train_examples):
    before, after = sentences(), sentences(train_examples=train_examples)
    assert (after["test"], after["validation"]) == (before["test"], before["validation"])
    shared = min(60, train_examples)
    assert after["train"][:shared] == before["train"][:shared]
    assert len(set(after["train"])) == train_examples
    assert not set(after["train"]) & {*after["test"], *after["validation"]}


def test_the_validation_size_leaves_the_test_sentences_alone():
    before, after = sentences(), sentences(validation_examples=25)
    assert after["test"] == before["test"]
    assert after["validation"][:20] == before["validation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_examples": 0}, "task.test_examples: must be at least 1, found 0"),
        ({"prompt": "{sauce}"}, "task.prompt: no column 'sauce' for the template '{sauce}'; there are: source"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(TaskError) as raised:
        Config(**{**SMALL, **change})
    assert str(raised.value) == message


def test_more_sentences_than_there_are():
    with pytest.raises(
        TaskError, match=r"^task: the phrasebook has up to \d+ sentence pairs; 10000050 were asked for$"
    ):
        load_task("synthetic", Config(train_examples=10_000_000, validation_examples=20, test_examples=30))


def test_the_grammar_is_what_the_data_depends_on():
    assert {path.name for path in synthetic.files(Config())} == {
        "synthetic.py",
        "phrasebook.py",
        "grammar.py",
        "lexicon.py",
    }
    assert all(path.is_file() for path in synthetic.files(Config()))
