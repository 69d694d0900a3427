"""Plain parallel text: which lines become examples, and what is said of files that do not go together."""

import pytest

from pipeline.tasks import SPLITS, TaskError, load_task, parallel, task_module

LINES = {
    "train": ("one\ntwo\nthree\n", "eins\nzwei\ndrei\n"),
    "validation": ("four\n", "vier\n"),
    "test": ("five\nsix", "fünf\nsechs"),  # no newline at the end
}


def write(folder, split, source, target):
    for suffix, text in (("en", source), ("de", target)):
        (folder / f"{split}.{suffix}").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def folder(tmp_path):
    for split, texts in LINES.items():
        write(tmp_path, split, *texts)
    return tmp_path


def config(folder, **changes):
    return parallel.Config(**{"source": "{split}.en", "target": "{split}.de", "data_dir": str(folder), **changes})


def refusal(configuration):
    with pytest.raises(TaskError) as raised:
        load_task("parallel", configuration)
    return str(raised.value)


def test_lines_become_examples(folder):
    task = load_task("parallel", config(folder, prompt="Übersetze: {source}\n", language="de"))
    assert [len(getattr(task, split)) for split in SPLITS] == [3, 1, 2]
    assert task.test[0] == {
        "prompt": "Übersetze: five\n",
        "completion": "fünf",
        "references": ["fünf"],
        "source": "five",
    }
    assert task.train["source"][:] == ["one", "two", "three"]
    assert task.language == "de"


def test_split_names_and_limits(folder):
    write(folder, "dev", "a\nb\nc\n", "x\ny\nz\n")
    task = load_task("parallel", config(folder, validation="dev", max_validation_examples=2, max_train_examples=9))
    assert task.validation["completion"][:] == ["x", "y"] and len(task.train) == 3


def test_byte_order_mark_carriage_returns_and_spaces_are_no_text(folder):
    write(folder, "validation", "\ufefffour \r\n\tfive\r\n".encode(), b"vier\nf\xc3\xbcnf\n")
    task = load_task("parallel", config(folder))
    assert task.validation["source"][:] == ["four", "five"] and task.validation["completion"][:] == ["vier", "fünf"]


def test_only_newlines_separate_lines(folder):
    """A line separator (U+2028) inside a text would shift one side against the other."""
    write(folder, "validation", "one\u2028two\nthree\n", "eins zwei\ndrei\n")
    assert load_task("parallel", config(folder)).validation["source"][:] == ["one\u2028two", "three"]


def test_pairs_with_an_empty_side_are_left_out(folder):
    write(folder, "validation", "one\n\nthree\nfour\n", "eins\nzwei\n \nvier\n")
    task = load_task("parallel", config(folder))
    assert task.validation["completion"][:] == ["eins", "vier"]
    assert [line.split(" ")[1] for line in task.left_out] == ["2", "3"] and "a side is empty" in task.left_out[0]
    write(folder, "validation", "\n", "\n")
    assert "have no line with a text on both sides (1 lines)" in refusal(config(folder))


def test_an_edited_file_is_read_again(folder):
    assert load_task("parallel", config(folder)).validation["completion"][:] == ["vier"]
    write(folder, "validation", "four\n", "VIER\n")
    assert load_task("parallel", config(folder)).validation["completion"][:] == ["VIER"]


def test_files_are_all_six(folder):
    assert {path.name for path in parallel.files(config(folder))} == {f"{s}.{t}" for s in SPLITS for t in ("en", "de")}
    (folder / "test.de").unlink()
    with pytest.raises(TaskError, match=r"^task\.target: no file '.*test\.de'"):
        parallel.files(config(folder))


def test_sides_of_unequal_length(folder):
    write(folder, "test", "five\nsix\n", "fünf\n")
    message = refusal(config(folder)).replace(str(folder), "")
    assert message.startswith("task: '/test.en' has 2 lines and '/test.de' has 1")


def test_text_that_is_not_utf_8(folder):
    write(folder, "test", b"f\xfcnf\n", b"x\n")
    message = refusal(config(folder)).replace(str(folder), "")
    assert message.startswith("task: /test.en:1: not UTF-8 (byte 1); convert it, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "train.en"}, "task.source: 'train.en' has no {split}"),
        ({"prompt": "{sauce}"}, "task.prompt: no column 'sauce'"),
        ({"prompt": "{source"}, "task.prompt: the template '{source' is not valid"),
        ({"prompt": "{source.x}"}, "task.prompt: the template '{source.x}' is not valid"),
        ({"prompt": "{source[x]}"}, "task.prompt: the template '{source[x]}' is not valid ("),
        ({"max_train_examples": 0}, "task.max_train_examples: must be at least 1, found 0"),
    ],
)
def test_configurations_that_are_refused(folder, change, message):
    with pytest.raises(TaskError) as raised:
        config(folder, **change)
    assert str(raised.value).startswith(message)


def test_braces_in_the_data_are_text(folder):
    write(folder, "validation", "{source} {x}\n", "{y}\n")
    assert load_task("parallel", config(folder)).validation["prompt"][:] == ["{source} {x}\n"]


def test_kinds_of_task():
    assert task_module("parallel") is parallel
    assert task_module("pipeline.tasks.parallel") is parallel  # the dotted path of one's own
    with pytest.raises(
        TaskError, match=r"^task\.name: 'paralel' is not one of parallel, columns, speech, nor a module "
    ):
        task_module("paralel")
    with pytest.raises(TaskError, match=r"^task\.name: cannot import 'no_such\.task' \(No module named 'no_such'\)$"):
        task_module("no_such.task")


def test_rows_kept_for_ppo_are_not_trained_on(folder):
    plain = load_task("parallel", config(folder))
    assert plain.ppo_prompts is None and plain.prompts is plain.train
    kept = load_task("parallel", config(folder, ppo_examples=2))
    assert kept.train["source"][:] == ["one"] and kept.prompts["source"][:] == ["two", "three"]
    assert refusal(config(folder, ppo_examples=3)).startswith(
        "task.ppo_examples: must be below the 3 training examples"
    )
    with pytest.raises(TaskError, match=r"task\.ppo_examples: must be at least 1, found 0"):
        config(folder, ppo_examples=0)
