"""Which columns are taken for prompts and answers, and that the task then reads them."""

import json

import pytest
from datasets import Dataset

from pipeline.tasks import TaskError, load_task
from pipeline.tasks.column_config import Config
from pipeline.tasks.detection import guess_columns

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SHAPES = [
    ({"question": "Hi", "answer": "Hello"}, {"prompt": "{question}\n", "completion": "answer"}),
    ({"id": "1", "Question": "Hi", "Answers": ["Hello", "Hey"]}, {"prompt": "{Question}\n", "references": "Answers"}),
    (
        {"instruction": "Greet", "input": "Hi", "output": "Hello", "text": "Greet Hi Hello"},
        {"prompt": "{instruction}\n{input}\n", "completion": "output"},
    ),
    (
        {"context": "A greeting.", "question": "Hi", "answers": {"text": ["Hello"], "answer_start": [0]}},
        {"prompt": "{context}\n{question}\n", "references": "{answers[text]}"},
    ),
    ({"messages": TURNS, "source": "web", "summary": "A greeting"}, {"messages": "messages"}),
    ({"id": "a", "conversations": SHAREGPT, "system": "Be brief."}, {"messages": "conversations"}),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"prompt": "prompt", "completion": "completion"}),
    ({"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]}, {"prompt": "prompt", "completion": "completion"}),
    ({"score": 1, "talk": TURNS}, {"messages": "talk"}),
    (
        {"translation": {"en": "Hi", "de": "Hello"}},
        {"prompt": "{translation[en]}\n", "references": "{translation[de]}"},
    ),
    ({"en": "Hi", "de": "Hello", "line": 3}, {"prompt": "{en}\n", "completion": "de"}),
]


@pytest.mark.parametrize(("row", "keys"), SHAPES, ids=[" ".join(row) for row, _ in SHAPES])
def test_columns_are_guessed_and_the_task_reads_them(row, keys, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 10)
    # Not from a list, whose keys datasets 5.0 sorts.
    rows = Dataset.from_json(str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path))
    assert guess_columns(rows) == keys
    parts = {"train": "train[:80%]", "validation": "train[80%:90%]", "test": "train[90%:]"}
    example = load_task("columns", Config(path=str(tmp_path / "data.jsonl"), **parts, **keys)).train[0]
    assert "Hi" in str(example["prompt"]) and example["references"][0] == "Hello"


@pytest.mark.parametrize(
    "row",
    [{"a": "x", "b": "y", "c": "z"}, {"question": "Hi", "label": 3}, {"prompt": "", "completion": "Hello", "n": 1}],
)
def test_columns_that_say_nothing_are_named(row):
    with pytest.raises(TaskError, match=f"among {', '.join(row)}"):
        guess_columns(Dataset.from_list([row]))


def test_a_column_that_is_null_in_the_first_row_is_looked_at_further_on():
    rows = [{"instruction": "Greet", "input": None, "output": None, "note": None}] * 2
    rows += [{"instruction": "Greet", "input": "Hi", "output": "Hello", "note": None}]
    keys = {"prompt": "{instruction}\n{input}\n", "completion": "output"}
    assert guess_columns(Dataset.from_list(rows)) == keys


def test_pairs_without_a_prompt_are_no_prompt_and_its_answer():
    hello, bye = (f"\n\nHuman: Hi\n\nAssistant: {answer}" for answer in ("Hello", "Bye"))
    with pytest.raises(TaskError, match=r"pairs of answers .*\(chosen, rejected\).* reward\.pairs"):
        guess_columns(Dataset.from_list([{"chosen": hello, "rejected": bye}]))


def test_a_chat_that_cannot_be_read_is_named_with_its_reason():
    turns = [{"role": "prompter", "content": "Hi"}, TURNS[1]]
    with pytest.raises(TaskError, match=r"task\.messages: .* 'prompter'; .* task\.messages_from"):
        guess_columns(Dataset.from_list([{"messages": turns}]))
