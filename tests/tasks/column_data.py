"""A little data set and the configurations that the tests of columns and tables read it with."""

import json

import pytest

from pipeline.tasks import TaskError, load_task
from pipeline.tasks.columns import Config

ROWS = [{"question": f"Wer ist Nr. {n}?", "answer": f"Jürgen {n}", "n": n} for n in range(20)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def config(folder, **changes):
    values = {
        "path": "{split}.jsonl",
        "data_dir": str(folder),
        "prompt": "Frage: {question}\n",
        "completion": "answer",
    }
    return Config(**{**values, **changes})


def single(path, **changes):
    """A configuration for one file, cut in three, of which `train` is the whole but the last two rows."""
    parts = {"train": "train[:-2]", "validation": "train[-2:-1]", "test": "train[-1:]"}
    return Config(**{"path": str(path), **parts, "prompt": "{question}", "completion": "answer", **changes})


def refusal(configuration):
    with pytest.raises(TaskError) as raised:
        load_task("columns", configuration)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def row_refusal(tmp_path, *rows, **changes):
    """The refusal of some rows, which are lines 1, 2, ... of data.jsonl; two good rows follow."""
    path = write_lines(tmp_path / "data.jsonl", [*rows, *ROWS[:2]])
    return refusal(single(path, **changes)).replace(str(tmp_path), "")
