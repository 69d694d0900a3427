"""Files, saved directories and the Hub: what is read from each, and the words about what cannot be."""

import json
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
from column_data import ROWS, config, refusal, single, write_lines
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from pipeline.runtime import hub as runtime_hub
from pipeline.tasks import columns, load_task
from pipeline.tasks.columns import Config

CSV = "question,answer,n\n" + "".join(f'"Wer, ""ja"" wer\nist {n}?",Jürgen {n},{n}\n' for n in range(5))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n\n".join(json.dumps(row) for row in ROWS[:5])),
        ("a.JSONL", "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:5]) + "\r\n"),
        ("a.json", json.dumps(ROWS[:5], indent=1)),
        ("a.json", json.dumps(ROWS[:5])),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS[:5])),
        ("a.csv", "question,answer,n\n" + "".join(f"Wer ist Nr. {n}?,Jürgen {n},{n}\n" for n in range(5))),
        ("a.csv", "\ufeffquestion,answer,n\r\n" + "".join(f"Wer ist Nr. {n}?,Jürgen {n},{n}\r\n" for n in range(5))),
        ("a.tsv", "question\tanswer\tn\n" + "".join(f"Wer ist Nr. {n}?\tJürgen {n}\t{n}\n" for n in range(5))),
    ],
)
def test_text_formats_give_the_same_examples(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    task = load_task("columns", single(tmp_path / name))
    assert task.train["prompt"][:] == [f"Wer ist Nr. {n}?" for n in range(3)]
    assert task.test["completion"][:] == ["Jürgen 4"]
    assert task.test["n"][0] == ("4" if name.endswith("sv") else 4)  # a CSV has texts only


def test_line_separators_inside_a_text_do_not_break_a_row(tmp_path):
    text = "one\u2028two\u0085three"
    path = write_lines(tmp_path / "a.jsonl", [{"question": text, "answer": text}] * 3)
    assert load_task("columns", single(path)).train[0]["prompt"] == text


def test_quoted_csv_fields_may_hold_anything_and_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(CSV + f"{'x' * 200_000},NA,null\n", encoding="utf-8")
    task = load_task("columns", single(tmp_path / "a.csv"))
    assert task.train["prompt"][0] == 'Wer, "ja" wer\nist 0?'
    assert len(task.test["prompt"][0]) == 200_000
    assert task.test["completion"][0] == "NA" and task.test["n"][0] == "null"  # words, not missing values


def test_quotes_in_a_file_of_tabs_without_quoted_fields_are_letters(tmp_path):
    lines = ["question\tanswer", '"Hi\ta', '"Hi" he said\t"a', 'Hi\ta"', '"\t5"', "Hi\ta"]
    (tmp_path / "a.tsv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    task = load_task("columns", single(tmp_path / "a.tsv"))
    assert task.train["prompt"][:] == ['"Hi', '"Hi" he said', "Hi"]
    assert task.train["completion"][:] == ["a", '"a', 'a"'] and task.validation["prompt"][0] == '"'
    quoted = ["question\tanswer", '"Hi\nyou"\ta', '"a ""b"" c"\ta', "Hi\ta"]  # as spreadsheets write them
    (tmp_path / "a.tsv").write_text("\n".join(quoted), encoding="utf-8")
    assert load_task("columns", single(tmp_path / "a.tsv")).train["prompt"][:] == ["Hi\nyou"]


def test_parquet(tmp_path):
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    task = load_task("columns", single(tmp_path / "a.parquet"))
    assert len(task.train) == 18 and task.train[3]["n"] == 3 and task.train[3]["completion"] == "Jürgen 3"


@pytest.mark.parametrize("kind", ["one data set", "with splits", "a directory per split"])
def test_directories_of_save_to_disk(tmp_path, kind):
    whole = Dataset.from_list(ROWS)
    saved = DatasetDict({name: whole.select(range(n, n + 4)) for name, n in (("train", 0), ("dev", 4), ("test", 8))})
    if kind == "with splits":
        saved.save_to_disk(str(tmp_path / "data"))
        configuration = config(tmp_path, path="data", validation="dev")
    elif kind == "one data set":
        whole.save_to_disk(str(tmp_path / "data"))
        configuration = single(tmp_path / "data", train="train[:4]", validation="train[4:8]", test="train[8:12]")
    else:
        for name, part in saved.items():
            part.save_to_disk(str(tmp_path / "data" / name))
        configuration = config(tmp_path, path="data/{split}", validation="dev")
    task = load_task("columns", configuration)
    assert task.train["n"][:] == [0, 1, 2, 3]
    assert task.validation["n"][:] == [4, 5, 6, 7]
    assert task.test["n"][:] == [8, 9, 10, 11]
    assert any(path.suffix == ".arrow" for path in columns.files(configuration))


@pytest.mark.parametrize(
    ("name", "content", "key", "words"),
    [
        ("a.jsonl", b'{"question": "q"}\n\n{"question": "q" "answer": 1}\n', "path", "/a.jsonl:3:18: not valid JSON"),
        ("a.jsonl", b'{"question": "q"}\n[1]\n', "path", "/a.jsonl:2: expected an object"),
        ("a.jsonl", '{"question": "Größe"}'.encode("latin1"), "path", "/a.jsonl:1: not UTF-8 (byte 16)"),
        ("a.jsonl", b"", "path", "'/a.jsonl' is empty"),
        ("a.jsonl", b"\n \n", "path", "'/a.jsonl' has no rows"),
        ("a.json", b'[{"question": "q"},\n {"question": }]', "path", "/a.json:2:15: not valid JSON"),
        ("a.json", b'{\n"data": []\n}', "path", "found one object"),
        ("a.json", b'[{"a": 1}, 2]', "path", "found a list with a number (item 1"),
        ("a.json", b"[]", "path", "'/a.json' has no rows"),
        ("a.csv", b"a,b\n1,2\n\xff,3\n", "path", "/a.csv:3: not UTF-8 (byte 8)"),
        ("a.csv", b"question,answer\n", "path", "'/a.csv' has no rows"),
        ("a.csv", b"Was?,Das.\nWer?,Der.\nWo?,Da.\nWie?,So.\n", "prompt", "there are: Was?, Das."),
        ("a.csv", b"question,answer\nq,a\n\nq,a,b\n", "path", "/a.csv:4: found 3 fields"),
        ("a.csv", b"question,answer\nq,a\nq\n", "path", "/a.csv:3: found 1 fields"),
        ("a.csv", b"question,answer,question\nq,a,q\n", "path", "the column 'question' twice"),
        ("a.csv", b"question;answer\nq;a, or b\n", "path", "separated by ';'"),
        ("a.csv", b"question\tanswer\nq\ta\n", "path", "as .tsv"),
        ("a.tsv", b'question\tanswer\n"q"\ta\n"q" he said\ta\n', "path", "/a.tsv:3: not a valid row"),
        ("a.tsv", b'question\tanswer\nq\t"a"\n"q\ta\nq\ta\nq"\ta\n', "path", "/a.tsv:3: a field"),
        ("a.csv", b'question,answer\n"q,a\nq,a\n', "path", "/a.csv:2: not a valid row"),
        ("a.parquet", b"question", "path", "cannot be read as parquet"),
        ("a.txt", b"question", "path", "must end in .json, .jsonl, "),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, name, content, key, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(single(tmp_path / name)).replace(str(tmp_path), "")
    assert message.startswith(f"task.{key}: ") and words in message


def test_missing_files(folder, tmp_path):
    message = refusal(config(folder, validation="dev"))
    assert message.startswith(
        f"task.path: no file '{folder}/dev.jsonl' for the validation split; there are: test.jsonl"
    )
    assert "name the split in task.validation" in message
    assert "set task.data_dir" in refusal(config(folder, path="{split}.csv"))
    assert f"give a file, such as '{folder}/{{split}}.jsonl'" in refusal(config(folder, path=str(folder)))
    DatasetDict({"train": Dataset.from_list(ROWS), "dev": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    message = refusal(config(folder, path=str(tmp_path / "d")))
    assert message.startswith("task.validation: the data has no split 'validation'")


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_hub_options_of_local_data_are_refused(folder, key):
    assert refusal(config(folder, **{key: "x"})).startswith(f"task.{key}: it would do nothing")


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose answer a test sets, and which the environment allows to ask; no request leaves the machine."""
    state = SimpleNamespace(answer=None, asked=[], loaded=[])

    def repo_info(self, name, repo_type=None, revision=None, timeout=None):
        state.asked.append((name, repo_type, revision))
        if state.answer is not None:
            raise state.answer

    def load(name, subset=None, revision=None):
        state.loaded.append((name, subset, revision))
        parts = {split: Dataset.from_list(ROWS[4 * n : 4 * n + 4]) for n, split in enumerate(("train", "test"))}
        return DatasetDict(parts)

    state.load = load
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: state.load(*args, **keys))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **keys: None)
    runtime_hub._ask.cache_clear()
    yield state
    runtime_hub._ask.cache_clear()


HUB = Config(
    path="nobody/questions", subset="de", prompt="{question}", completion="answer",
    train="train[:75%]", validation="train[75%:]",
)  # fmt: skip


def test_a_hub_data_set(hub):
    task = load_task("columns", replace(HUB, revision="v1"))
    assert [task.train["n"][:], task.validation["n"][:], task.test["n"][:]] == [[0, 1, 2], [3], [4, 5, 6, 7]]
    assert hub.loaded == [("nobody/questions", "de", "v1")]
    assert hub.asked == [("nobody/questions", "dataset", "v1")]
    assert columns.files(HUB) == []
    assert refusal(replace(HUB, test="dev")).startswith("task.test: the data has no split 'dev'; there are: train, ")
    assert "split 'train' of 'nobody/questions'" in refusal(replace(HUB, completion="reply"))


def test_an_unknown_hub_data_set(hub):
    response = SimpleNamespace(status_code=404, headers={}, request=None)
    hub.answer = HfHubHTTPError("404 Repository Not Found", response=response)
    message = refusal(HUB)
    assert message.startswith("task.path: 'nobody/questions' is neither a file") and "data/{split}.jsonl" in message
    assert not hub.loaded


def test_an_unknown_subset(hub):
    def load(*args, **keys):
        raise ValueError("BuilderConfig 'de' not found. Available: ['en', 'fr']")

    hub.load = load
    message = refusal(HUB)
    assert message.startswith("task.subset: 'nobody/questions' cannot be loaded") and "['en', 'fr']" in message


def test_a_hub_that_does_not_answer_is_named_with_two_ways_out(hub):
    hub.answer = ConnectionError("no network")
    message = refusal(HUB)
    assert message.startswith("task.path: 'nobody/questions' is neither a file") and "no network" in message
    assert "data/{split}.jsonl" in message and "HF_HUB_OFFLINE=1" in message
    assert not hub.loaded  # the library would ask again and again


def test_offline_the_cached_copy_is_used(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_task("columns", HUB).test["n"][:] == [4, 5, 6, 7]
    assert hub.loaded == [("nobody/questions", "de", None)] and not hub.asked
    message = refusal(replace(HUB, revision="0123abc"))
    assert message.startswith("task.revision: the cached copy of 'nobody/questions'")


# What the readers of `datasets` would change, or cannot read


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (["2020-01-01", "2021-12-24 10:30:00"], str),  # would become dates
        (["a", {"b": 1}], None),
    ],
)
def test_values_stay_what_they_are(tmp_path, answer, expected):
    rows = [{"question": "q", "answer": "a", "more": value} for value in [answer[0], *answer]]
    task = load_task("columns", single(write_lines(tmp_path / "a.jsonl", rows)))
    values = [task.train["more"][0], task.validation["more"][0], task.test["more"][0]]
    assert values == [answer[0], *answer]
    assert expected is None or all(isinstance(value, expected) for value in values)


def test_a_piece_of_a_file_in_which_all_texts_are_dates_keeps_them(tmp_path):
    first = {"question": "q", "answer": "none", "more": [{"on": "none"}], "long": "x" * (10 << 20)}  # one piece
    dates = {"question": "q", "answer": "2020-01-01", "more": [{"on": "2020-01-01T10:00:00"}], "long": ""}
    task = load_task("columns", single(write_lines(tmp_path / "a.jsonl", [first, dates, dates])))
    assert task.train["completion"][:] == ["none"] and task.test["completion"][:] == ["2020-01-01"]
    assert task.test[0]["more"] == [{"on": "2020-01-01T10:00:00"}]


def test_huge_whole_numbers_keep_their_digits(tmp_path):
    for number, other in ((2**53 + 1, 0.5), (12345678901234567890123, 1)):
        rows = [{"question": "q", "answer": value} for value in (number, number, other, number)]
        task = load_task("columns", single(write_lines(tmp_path / "a.jsonl", rows), completion="{answer}"))
        assert [*task.train["completion"], *task.validation["completion"]] == [str(number)] * 2 + [str(other)]


def test_a_cache_that_cannot_be_written_is_no_need(tmp_path, monkeypatch):
    def no_room(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(datasets, "load_dataset", no_room)
    monkeypatch.setattr(Dataset, "from_generator", no_room)
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    assert load_task("columns", single(tmp_path / "a.csv")).test["completion"][:] == ["Jürgen 4"]
    path = write_lines(tmp_path / "a.jsonl", ROWS[:4])
    assert load_task("columns", single(path)).test["completion"][:] == ["Jürgen 3"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_are_mapped_from_disk(tmp_path, suffix):
    content = CSV if suffix == "csv" else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / f"a.{suffix}").write_text(content, encoding="utf-8")
    assert load_task("columns", single(tmp_path / f"a.{suffix}")).train.cache_files
