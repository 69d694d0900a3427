"""Data as people have it: read as it is, or refused with the keys to write; and those keys then read it."""

import json

import pytest
from datasets import Dataset

from pipeline.tasks import TaskError, columns, preferences

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
# Rows, the keys that a message suggests for them, the prompt and the completion.
SHAPES = {
    "ShareGPT": ({"conversations": SHAREGPT}, {"messages": "conversations"}, [Q], "a"),
    "messages": ({"id": "1", "messages": [Q, A]}, {"messages": "messages"}, [Q], "a"),
    "Alpaca": (
        {"instruction": "q", "input": "r", "output": "a"},
        {"prompt": '"{instruction}\\n{input}"', "completion": "output"},
        "q\nr",
        "a",
    ),
    "Alpaca without input": (
        {"instruction": "q", "output": "a"},
        {"prompt": "instruction", "completion": "output"},
        "q",
        "a",
    ),
    "pairs": ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "prompt", "completion": "chosen"}, "q", "a"),
    "pairs of chats": ({"chosen": [Q, A], "rejected": [Q, B]}, {"messages": "chosen"}, [Q], "a"),
    "questions": ({"question": "q", "answers": ["a", "b"]}, {"prompt": "question", "references": "answers"}, "q", "a"),
    "dialogue": (
        {"messages": [Q], "responses": ["a", "b"]},
        {"prompt": "messages", "references": "responses"},
        [Q],
        "a",
    ),
}


@pytest.fixture
def load(tmp_path):
    """Each call writes one row as all splits and reads it by these keys."""

    def read(row, parquet=False, **keys):
        ending = "parquet" if parquet else "jsonl"
        for split in ("train", "validation", "test"):
            file = tmp_path / f"{split}.{ending}"
            if parquet:
                Dataset.from_list([row]).to_parquet(str(file))
            else:
                file.write_text("\ufeff" + json.dumps(row) + "\n")  # as Windows writes it
        return columns.load(columns.Config(path=f"{{split}}.{ending}", data_dir=str(tmp_path), **keys)).train[0]

    return read


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_column_is_refused_with_the_keys_that_read_such_rows(name, load):
    row, keys, prompt, completion = SHAPES[name]
    with pytest.raises(TaskError) as caught:
        load(row, prompt="xyzzy", references="xyzzy")
    written = " and ".join(f"{key}: {value}" for key, value in keys.items())
    assert str(caught.value).endswith(f"; rows like these are read by {written}")
    keys = {key: value.strip('"').replace("\\n", "\n") for key, value in keys.items()}
    for parquet in (False, True):
        example = load(row, parquet=parquet, **keys)
        assert (example["prompt"], example["completion"]) == (prompt, completion)


def test_columns_of_no_known_shape_are_listed_alone(load):
    with pytest.raises(TaskError, match=r"there are: x, y$"):
        load({"x": "1", "y": "2"}, prompt="xyzzy", references="y")


def test_a_mapping_is_refused_with_the_field_to_write(load):
    row = {"question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}
    with pytest.raises(TaskError, match=r"'answers' holds a mapping of text, answer_start; write '{answers\[text\]}'"):
        load(row, prompt="question", references="answers")
    for parquet in (False, True):
        assert load(row, parquet, prompt="question", references="{answers[text]}")["references"] == ["a", "b"]
    with pytest.raises(TaskError, match=r"write '{translation\[en\]}'"):
        load({"translation": {"en": "x", "de": "y"}}, prompt="translation", completion="{translation[de]}")


def test_contents_in_parts_are_joined_and_images_refused(load):
    parts = [{"type": "text", "text": "look "}, {"type": "text", "text": "here"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[1]]}]}
    example = load(row, messages="messages")
    assert (example["prompt"][0]["content"], example["completion"]) == ("look here", "here")
    row["messages"][0]["content"] = [parts[0], {"type": "image_url", "image_url": "x.png"}]
    with pytest.raises(TaskError, match="a part of the type 'image_url'; only texts"):
        load(row, messages="messages")


def test_neither_prompt_nor_messages_says_how_both_are_written():
    with pytest.raises(TaskError, match=r"found neither; a column of chats is read by messages: COLUMN"):
        columns.Config(path="x.jsonl")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"question": "q", "response_chosen": "a", "response_rejected": "b"},
            "read by prompt: question, chosen: response_chosen, rejected: response_rejected",
        ),
        ({"conversations": SHAREGPT[:1], "chosen": "a", "rejected": "b"}, "such as prompt: conversations"),
        ({"input": "q", "chosen": "a", "rejected": "b"}, "such as prompt: input"),
    ],
)
def test_pairs_are_refused_with_the_keys_that_read_them(tmp_path, row, words):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    config = {"path": "{split}.jsonl", "data_dir": str(tmp_path)}
    with pytest.raises(TaskError, match=r"reward\.pairs") as caught:
        preferences.load(preferences.Config(**config))
    assert words in str(caught.value)
    suggested = dict(part.split(": ") for part in words.split("read by ")[-1].removeprefix("such as ").split(", "))
    pair = preferences.load(preferences.Config(**config, **suggested)).train[0]
    assert (pair.chosen, pair.rejected) == ("a", "b") and pair.prompt in ("q", [Q])
