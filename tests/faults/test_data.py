"""Data that is broken, empty, of the wrong type, encoding or length: named to the line, or left out and counted."""

import json
from pathlib import Path

import pytest
from tiny_run import (
    COLUMNS,
    MAINS,
    PARALLEL,
    ROWS,
    only_error,
    outcome,
    write_parallel,
    write_recipe,
    write_rows,
)

from pipeline.recipe import load_recipe
from pipeline.tasks import SPLITS, TaskError, columns, load_task, preferences

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
BROKEN = '{"english": "a dog" "german": "ein Hund"}'
NULL = '{"english": "a", "german": null}\n'
SKIP = "task.skip_broken_rows=true"


def refused(capfd, folder: Path, *overrides: str, task: str = COLUMNS, code: int = 1, program: str = "sft.py") -> str:
    """What a program says of the data in `folder`; nothing of the stage is left but its start."""
    assert outcome(MAINS[program], write_recipe(folder, task), *overrides) == code
    assert not list((folder / "runs" / "tiny" / "sft").glob("*.safetensors"))
    assert not (folder / "runs" / "tiny" / "sft" / "stage.json").exists()
    return only_error(capfd.readouterr().err).replace(str(folder), "")


def record(folder: Path, stage: str = "sft") -> dict:
    """The record of a finished stage."""
    return json.loads((folder / "runs" / "tiny" / stage / "stage.json").read_text())


# 26: a broken line


def test_a_broken_line_is_named_with_file_line_column_and_a_snippet(tmp_path, capfd):
    write_rows(tmp_path, [ROWS[0], BROKEN, *ROWS])
    assert refused(capfd, tmp_path) == (
        f"error: sft: task.path: /train.jsonl:2:21: not valid JSON (Expecting ',' delimiter) near {BROKEN!r}"
    )


def test_broken_rows_are_skipped_counted_and_recorded_where_the_recipe_says_so(tmp_path, capfd):
    write_rows(tmp_path)
    broken = [BROKEN, "[1]", {"english": "bread", "german": None}, {"english": " ", "german": "x"}, "{" * 100_000]
    write_rows(tmp_path, [*ROWS, *broken], ["train"])
    assert outcome(MAINS["sft.py"], write_recipe(tmp_path), SKIP) == 0
    said = capfd.readouterr().err.replace(str(tmp_path), "")
    assert "task: 5 rows are left out: /train.jsonl:5:21: not valid JSON" in said
    assert "; /train.jsonl:6: expected an object {...}, found a list; " in said and "; and 2 more\n" in said
    found = record(tmp_path)
    assert found["rows_left_out"] == 5 and len(found["first_left_out"]) == 3
    assert found["settings"]["task.skip_broken_rows"] is True
    text = (tmp_path / "runs" / "tiny" / "recipe.yaml").read_text()
    assert "skip_broken_rows: true" in text


@pytest.mark.parametrize(
    ("name", "content", "left_out"),
    [
        ("a.csv", "english,german\na,b\nc\nd,e,f\ng,h\n", [":3: found 1 fields", ":4: found 3 fields"]),
        ("a.json", '[{"english": "a", "german": "b"}, 3, {"english": "c", "german": "d"}]', ["(item 1, the first"]),
        (
            "a.json",
            '{"english": "a", "german": "b"}\n{"english": 1}\n{\n' * 2,
            [":3:2: not ", ":6:2: not ", "line 2 of"],
        ),
    ],
)
def test_other_formats_skip_too(tmp_path, name, content, left_out):
    (tmp_path / name).write_text(content)
    options = {"path": str(tmp_path / name), "prompt": "english", "completion": "german"}
    parts = {"train": "train[:-1]", "validation": "train[-1:]", "test": "train[-1:]"}
    with pytest.raises(TaskError):
        load_task("columns", columns.Config(**options, **parts))
    with pytest.raises(TaskError, match="shares"):  # the good rows are those that the parts are of
        load_task("columns", columns.Config(**options, **parts, skip_broken_rows=True))
    for split in SPLITS:
        (tmp_path / f"{split}{name}").write_text(content)
    options["path"] = str(tmp_path / f"{{split}}{name}")
    task = load_task("columns", columns.Config(**options, skip_broken_rows=True))
    assert len(task.train) == 2 and task.train["completion"][:][0] == "b"
    ours = [line for line in task.left_out if f"train{name}" in line]
    assert all(any(text in line for line in ours) for text in left_out)


def test_pairs_of_a_reward_model_skip_too(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "chosen": None, "rejected": "bad"},
        "{",
    ]
    write_rows(tmp_path, rows, ["train", "validation"])
    path = str(tmp_path / "{split}.jsonl")
    with pytest.raises(TaskError, match=r"^reward\.pairs\.path: .*train\.jsonl:3:2: not valid JSON"):
        preferences.load(preferences.Config(path=path))
    found = preferences.load(preferences.Config(path=path, skip_broken_rows=True))
    assert (len(found.train), len(found.validation), len(found.left_out)) == (1, 1, 4)
    assert any(
        "line 2 of" in line and "reward.pairs.chosen: the column 'chosen' is null" in line for line in found.left_out
    )


# 27: nothing is left


@pytest.mark.parametrize(
    ("task", "files", "overrides", "message"),
    [
        (COLUMNS, {"train.jsonl": ""}, [], "task.path: the file '/train.jsonl' is empty"),
        (COLUMNS, {"validation.jsonl": "\n \n"}, [], "task.path: the file '/validation.jsonl' has no rows"),
        (COLUMNS, {"train.jsonl": "{\n{\n"}, [SKIP], "'/train.jsonl' has no row that is not broken: /train.jsonl:1:2"),
        (COLUMNS, {"test.jsonl": NULL * 5}, [SKIP], "in lines 1, 2, 3 and 2 more of '/test.jsonl', so every row is"),
        (COLUMNS, {}, ["task.train=train[4:]"], "task.train: 'train[4:]' is empty: '/train.jsonl' has 4 rows"),
        (PARALLEL, {"train.en": "", "train.de": ""}, [], "'/train.en' and '/train.de' have no line with a text on"),
        (PARALLEL, {"test.en": "a\n\n", "test.de": "\nb\n"}, [], "have no line with a text on both sides (2 lines)"),
    ],
)  # fmt: skip
def test_empty_data_is_named(tmp_path, capfd, task, files, overrides, message):
    write_rows(tmp_path)
    write_parallel(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    # The chain counts the pairs of parallel files before it starts anything.
    before = task == PARALLEL and any(name.startswith("train") for name in files)
    assert message in refused(capfd, tmp_path, *overrides, task=task, code=2 if before else 1)


# 28: columns and values


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"german": "x"}, "task.prompt: {english} is null or missing"),
        ({"english": None, "german": "x"}, "task.prompt: {english} is null or missing, expected a text or a number"),
        ({"english": "x", "german": 5}, "task.completion: the column 'german' holds a number, not a text"),
        ({"english": "x", "german": ["y"]}, "task.completion: the column 'german' holds a list, expected a text"),
    ],
)
def test_null_and_wrong_types_name_the_first_three_lines(tmp_path, capfd, bad, message):
    write_rows(tmp_path, [ROWS[0], bad, ROWS[1], bad, bad, ROWS[2], bad])
    assert (
        f"{message}" in (said := refused(capfd, tmp_path)) and "in lines 2, 4, 5 and 1 more of '/train.jsonl'" in said
    )


def test_half_of_a_character_is_named(tmp_path, capfd):
    bad = {"english": "x", "german": "\ud83d"}
    write_rows(tmp_path, [ROWS[0], bad, ROWS[1]])
    assert "task.path: /train.jsonl:2: half of a character" in refused(capfd, tmp_path)
    write_rows(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([*ROWS, bad]))
    data = {"path": str(tmp_path / "a.json"), "prompt": "english", "completion": "german", "skip_broken_rows": True}
    task = load_task("columns", columns.Config(**data, train="train[:2]", validation="train[2:3]", test="train[3:]"))
    assert len(task.left_out) == 1 and "(item 4, the first is 0): half of a character" in task.left_out[0]


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, capfd):
    write_rows(tmp_path)
    said = refused(capfd, tmp_path, "task.completion=germn")
    assert "task.completion: no column 'germn' in '/train.jsonl'" in said
    assert "did you mean 'german'?" in said


# 29: encodings

ACCENT = '{"english": "caf\u00e9", "german": "Caf\u00e9"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n" + ACCENT.encode("latin1"), "/train.jsonl:2: not UTF-8 (byte 19); convert it, "),
        (b"\xef\xbb\xbf" + ACCENT.encode("latin1"), "/train.jsonl:1: not UTF-8 (byte 19); convert it"),
        (ACCENT.encode("utf-16"), "/train.jsonl:1: UTF-16, not UTF-8 (byte 0); convert it"),
        (b'{}\n{"english": "a\0b"}', "/train.jsonl:2: a NUL (byte 17); no text has one"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "task", [COLUMNS, PARALLEL, COLUMNS.replace("jsonl", "csv")], ids=["jsonl", "parallel", "csv"]
)
def test_other_encodings_name_file_line_byte_and_the_way_out(tmp_path, capfd, content, message, task):
    write_rows(tmp_path)
    write_parallel(tmp_path)
    suffix = "en" if task == PARALLEL else "csv" if "csv" in task else "jsonl"
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_text("english,german\na,b\n")
    (tmp_path / f"train.{suffix}").write_bytes(content)
    code = 2 if task == PARALLEL else 1
    assert message.replace("jsonl", suffix) in refused(capfd, tmp_path, task=task, code=code)
    if task == PARALLEL:
        assert message.replace("jsonl", suffix) in refused(capfd, tmp_path, task=task, code=2, program="run.py")


@pytest.mark.parametrize(
    "task", [COLUMNS, PARALLEL, COLUMNS.replace("jsonl", "csv")], ids=["jsonl", "parallel", "csv"]
)
def test_a_byte_order_mark_and_carriage_returns_are_accepted(tmp_path, task):
    write_rows(tmp_path)
    write_parallel(tmp_path)
    csv = "".join(f"{row['english']},{row['german']}\n" for row in ROWS)
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_text(f"english,german\n{csv}")
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    recipe = load_recipe(write_recipe(tmp_path, task))
    train = load_task(recipe.task.name, recipe.task.config).train
    assert train["completion"][:] == [row["german"] for row in ROWS]
    assert train["prompt"][:] == [f"{row['english']}\n" for row in ROWS]


# 30: parallel files


def test_parallel_files_of_unequal_length_name_both_counts(tmp_path, capfd):
    write_parallel(tmp_path)
    (tmp_path / "train.de").write_text("x\ny\nz\n")
    message = "'/train.en' has 4 lines and '/train.de' has 3: parallel files must match line by line"
    for program in ("run.py", "sft.py"):
        assert message in refused(capfd, tmp_path, task=PARALLEL, code=2, program=program)
    write_parallel(tmp_path)
    (tmp_path / "test.de").write_text("x\ny\nz\n")
    assert message.replace("train", "test") in refused(capfd, tmp_path, task=PARALLEL)


# 31: prompts longer than the context

NUMBERS = " ".join(str(number * 7919) for number in range(1, 60))  # many tokens, whatever the tokenizer has learnt
LONG = {"english": NUMBERS, "german": "die Katze"}


def test_sft_cuts_what_is_longer_and_says_how_much(tmp_path, capfd):
    write_rows(tmp_path)
    middle = {"english": "the cat", "german": NUMBERS}
    write_rows(tmp_path, [*ROWS, LONG, middle, LONG], ["train"])
    overrides = ["ppo=null", "sft.max_length=40"]
    assert outcome(MAINS["sft.py"], write_recipe(tmp_path), *overrides) == 0
    said = capfd.readouterr().err
    assert "of 7 examples of train 1 are cut to sft.max_length (40 tokens): the first is line 6 of" in said
    assert "2 are left out" in said and "the first is line 5 of" in said
    assert "examples of validation" not in said


@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_prompts_that_leave_no_room_are_refused_before_sft_trains(tmp_path, capfd, architecture):
    write_rows(tmp_path)
    override = f"model.from_scratch.architecture={architecture}"
    for split, key in (("train", "ppo.response_length"), ("test", "eval.max_new_tokens")):
        write_rows(tmp_path)
        write_rows(tmp_path, [*ROWS, LONG, LONG], [split])
        said = refused(capfd, tmp_path, override)
        assert f"error: sft: {key}: 2 of 6 prompts of {split} " in said and f"in line 5 of '/{split}.jsonl'" in said
        assert ("leave no room for 8 tokens in the 64 positions" in said) == (architecture == "llama")


def test_sft_alone_refuses_data_of_which_nothing_fits(tmp_path, capfd):
    write_rows(tmp_path, [LONG, LONG], ["train"])
    write_rows(tmp_path, splits=["validation", "test"])
    assert "sft.max_length: each of the 2 prompts of train" in refused(capfd, tmp_path, "ppo=null")


def test_ppo_and_the_evaluation_refuse_what_leaves_no_room(tmp_path, capfd):
    write_rows(tmp_path)
    path = write_recipe(tmp_path)
    assert outcome(MAINS["sft.py"], path) == 0
    capfd.readouterr()
    for program, override, key in (
        ("ppo.py", "ppo.response_length=62", "ppo: ppo.response_length"),
        ("eval.py", "eval.max_new_tokens=62", "eval: eval.max_new_tokens"),
    ):
        systems = "eval.systems=[sft]"
        assert outcome(MAINS[program], path, override, systems) == 1
        assert f"error: {key}: " in (said := only_error(capfd.readouterr().err))
        assert "no room for 62 tokens in the 64 positions" in said


def test_a_reference_counts_as_far_as_the_model_can_read(tmp_path):
    write_rows(tmp_path)
    write_rows(tmp_path, [{"english": "a dog", "german": NUMBERS}], ["test"])
    path = write_recipe(tmp_path)
    assert outcome(MAINS["sft.py"], path, "ppo=null") == 0
    assert outcome(MAINS["eval.py"], path, "ppo=null", "eval.systems=[sft]") == 0
    (line,) = (tmp_path / "runs" / "tiny" / "eval" / "predictions" / "sft.jsonl").read_text().splitlines()
    assert 40 < json.loads(line)["reference_tokens"] < 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.response_length=64", "ppo.response_length: must be below max_position_embeddings (64) of '{model}' to"),
        ("eval.max_new_tokens=70", "eval.max_new_tokens: must be below max_position_embeddings (64) of '{model}' to"),
        ("sft.max_length=65", "sft.max_length: must be at most max_position_embeddings (64) of '{model}', found 65"),
        ("reward={pairs: {max_new_tokens: 64}}", "reward.pairs.max_new_tokens: must be below max_position_embeddings"),
    ],
)  # fmt: skip
def test_lengths_beyond_a_pretrained_model_are_refused_before_anything_is_loaded(
    tmp_path, capfd, base_directory, override, message
):
    write_rows(tmp_path)
    model = f"model={{model_name_or_path: {base_directory}}}"
    for program in ("run.py", "ppo.py"):
        assert outcome(MAINS[program], write_recipe(tmp_path), model, override) == 2
        assert message.replace("{model}", str(base_directory)) in only_error(capfd.readouterr().err)
