"""Data sets by their columns: how columns become examples and splits, and the words of every refusal."""

import json
import os
from dataclasses import replace

import pytest
from column_data import ROWS, config, refusal, row_refusal, single, write_lines
from datasets import ClassLabel, Dataset, Features, List, Value

from pipeline.recipe import RecipeError, check_recipe, load_recipe
from pipeline.rewards import Reward, compute_rewards
from pipeline.tasks import SPLITS, TaskError, columns, load_task
from pipeline.tasks.column_examples import TRAINER_ARGUMENTS


def test_files_by_split(folder):
    task = load_task("columns", config(folder, language="de"))
    assert [len(getattr(task, split)) for split in SPLITS] == [4, 3, 2]
    assert task.train[1] == {
        "prompt": "Frage: Wer ist Nr. 1?\n",
        "completion": "Jürgen 1",
        "references": ["Jürgen 1"],
        **ROWS[1],
    }
    assert task.test["n"][:] == [7, 8] and task.language == "de"
    assert columns.files(config(folder)) == [folder / f"{split}.jsonl" for split in SPLITS]


def test_a_column_puts_test_rows_into_clusters(folder):
    assert load_task("columns", config(folder)).cluster is None
    task = load_task("columns", config(folder, cluster="question"))
    assert task.cluster == "question" and task.test["question"][:] == ["Wer ist Nr. 7?", "Wer ist Nr. 8?"]
    write_lines(folder / "test.jsonl", [{**row, "references": ["a", 1]} for row in ROWS[:3]])
    task = load_task("columns", config(folder, cluster="references"))  # a name that examples have of their own
    assert task.cluster == "data_references" and len(task.test["data_references"][:]) == 3


def test_a_cluster_that_is_no_column_or_null_is_refused(folder):
    assert "task.cluster: no column 'quest'" in refusal(config(folder, cluster="quest"))
    with pytest.raises(TaskError, match=r"task.cluster: write the name of a column, found the template '\{n\}'"):
        config(folder, cluster="{n}")
    write_lines(folder / "test.jsonl", [{**row, "page": "a" if row["n"] else None} for row in ROWS[:3]])
    message = refusal(config(folder, cluster="page"))
    assert "task.cluster: the column 'page' is null in line 1 of" in message
    with pytest.raises(TaskError, match=r"task\.cluster: the test rows have no column 'page'"):
        replace(load_task("columns", config(folder, test="validation", validation="test")), cluster="page")


def test_limits_keep_the_first_rows(folder):
    task = load_task("columns", config(folder, max_train_examples=2, max_validation_examples=1, max_test_examples=9))
    assert task.train["n"][:] == [0, 1] and task.validation["n"][:] == [4] and task.test["n"][:] == [7, 8]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_edited_file_is_read_again(tmp_path, suffix):
    """Also with the size and the time of the file before, as copies may have them."""
    path = tmp_path / f"a.{suffix}"
    for answer in ("a", "b"):
        row = f"q,{answer}\n" if suffix == "csv" else json.dumps({"question": "q", "answer": answer}) + "\n"
        path.write_text("question,answer\n" * (suffix == "csv") + row * 3)
        os.utime(path, (10**9, 10**9))
        assert load_task("columns", single(path)).test["completion"][:] == [answer]


def test_parts_of_one_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    cut = {"train": "train[:85%]", "validation": "train[85%:18]", "test": "train[-2:]"}
    task = load_task("columns", single(path, **cut))
    assert task.train["n"][:] == list(range(17))
    assert task.validation["n"][:] == [17] and task.test["n"][:] == [18, 19]


def test_a_part_of_a_file_with_split_in_its_name(folder):
    task = load_task("columns", config(folder, train="train[1:]", validation="train[:1]", test="test"))
    assert task.train["n"][:] == [1, 2, 3] and task.validation["n"][:] == [0]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"train": "train"}, "task.validation: 'train[-2:-1]' shares 1 row"),
        ({"test": "train[:10%]"}, "task.test: 'train[:10%]' shares 2 rows"),
        ({"test": "train[30:]"}, "task.test: 'train[30:]' is empty"),
        ({"test": "test"}, "task.test: 'a.jsonl' is one file"),
        ({"test": "train[:x]"}, "task.test: 'train[:x]' is not the name"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be(tmp_path, monkeypatch, cut, message):
    write_lines(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError) as raised:
        load_task("columns", single("a.jsonl", **cut))
    assert str(raised.value).startswith(message)


def test_the_same_split_twice_is_refused(folder):
    assert refusal(config(folder, validation="test")).startswith(
        "task.test: 'test' shares 2 rows with task.validation"
    )


def test_several_references_and_the_first_as_completion(tmp_path):
    rows = [{"question": "q", "answers": ["first", "second"]}, {"question": "q", "answers": ["only"]}]
    path = write_lines(tmp_path / "a.jsonl", rows * 2)
    task = load_task("columns", single(path, completion=None, references="answers"))
    assert task.train["references"][:] == [["first", "second"], ["only"]]
    assert task.train["completion"][:] == ["first", "only"]
    assert task.test["answers"][:] == [["only"]]  # the column itself travels along


def test_completion_and_references_are_two_things(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"q": "x", "long": "the long", "short": "l", "k": {"all": ["l", "L"]}}] * 3
    )
    keys = {"prompt": "q", "completion": "{long} ({short})"}
    assert load_task("columns", single(path, **keys, references="short")).train[0]["references"] == ["l"]
    example = load_task("columns", single(path, **keys, references="{k[all]}")).train[0]
    assert (example["completion"], example["references"]) == ("the long (l)", ["l", "L"])
    assert load_task("columns", single(path, **keys, references="<{short}>")).train[0]["references"] == ["<l>"]


def test_templates(tmp_path):
    row = {"a": "x", "n": 3, "f": 0.25, "list": ["first", "second"], "map": {"key": "value"}, "my column": "mine"}
    path = write_lines(tmp_path / "a.jsonl", [row] * 3)
    template = "{a}{n} {f:.1f} {list[1]} {map[key]} {my column} {{literal}} {a!r:>5}"
    example = load_task("columns", single(path, prompt=template, completion="{n}")).train[0]
    assert example["prompt"] == "x3 0.2 second value mine {literal}   'x'"
    assert example["completion"] == "3"


def test_whole_numbers_beside_broken_ones_stay_whole_in_texts(tmp_path):
    numbers = [18, 18, 2.5, -0.25]
    rows = [{"q": n, "n": {"all": [n, 1.5]}} for n in numbers]
    path = write_lines(tmp_path / "a.jsonl", rows)
    keys = {"prompt": "{q} {n[all][0]} {q:.1f}", "completion": "{q}", "references": "{n[all][0]}"}
    task = load_task("columns", single(path, **keys))
    assert [task.train[0][key] for key in ("prompt", "completion", "references")] == ["18 18 18.0", "18", ["18"]]
    assert (task.validation["completion"][0], task.test["completion"][0]) == ("2.5", "-0.25")


def test_labels_are_their_names_in_texts(tmp_path):
    label = ClassLabel(names=["bad", "good"])
    features = Features({"q": Value("string"), "y": label, "all": List(label), "map": {"y": label}})
    rows = [{"q": "q", "y": y, "all": [1, 0], "map": {"y": 1}} for y in (1, 0, 1, -1, None)]
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "labels"))
    parts = {"train": "train[:1]", "validation": "train[1:2]", "test": "train[2:3]"}
    keys = {"prompt": "{y} {map[y]}?", "completion": "y", "references": "all"}
    task = load_task("columns", single(tmp_path / "labels", **{**keys, **parts}))
    assert [task.train[0][key] for key in keys] == ["good good?", "good", ["good", "bad"]]
    assert (task.train[0]["y"], task.validation[0]["completion"]) == (1, "bad")  # rewards get the number
    for test, row in (("train[3:4]", 3), ("train[4:]", 4)):  # no label
        message = refusal(single(tmp_path / "labels", **{**keys, **parts, "test": test}))
        assert "{y} is null or missing" in message and f"in row {row} of" in message


CHAT = [
    {"role": "user", "content": "Hallo"},
    {"role": "assistant", "content": "Tag!"},
    {"role": "user", "content": "Wie geht's?"},
    {"role": "assistant", "content": "Gut 😀", "thinking": "hm"},
    {"role": "user", "content": "Fein."},
]


def chat(tmp_path, messages, **keys):
    path = write_lines(tmp_path / "chat.jsonl", [{"chat": messages, "id": n} for n in range(3)])
    return single(path, prompt=None, completion=None, messages="chat", **keys)


def test_chats_end_with_the_last_answer(tmp_path):
    example = load_task("columns", chat(tmp_path, CHAT)).train[0]
    assert example["prompt"] == CHAT[:3]
    assert (example["completion"], example["references"]) == ("Gut 😀", ["Gut 😀"])


def test_a_system_message_is_put_in_front_where_there_is_none(tmp_path):
    own = [{"role": "system", "content": "Own."}, *CHAT]
    assert load_task("columns", chat(tmp_path, CHAT, system="Be brief.")).train[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        *CHAT[:3],
    ]
    assert load_task("columns", chat(tmp_path, own, system="Be brief.")).train[0]["prompt"] == own[:4]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:1], "task.messages: the column 'chat' has no message of the role assistant, in line 1 of "),
        (CHAT[1:2], "task.messages: the column 'chat' has no message before"),
        ([{"role": "system", "content": "."}, CHAT[1]], "task.messages: the column 'chat' has no message before"),
        ("Hallo", "task.messages: the column 'chat' holds a text"),
        (["Hallo"], "task.messages: a message in the column 'chat' holds a text"),
        ([{"who": "human", "says": "Hi"}], "task.messages: a message in the column 'chat' has who, says"),
        ([{**CHAT[0], "content": None}], "task.messages: the content of a message is null"),
        ([{**CHAT[0], "content": [{"type": "image"}]}], "task.messages: the content of a message has a part of"),
        ([{**CHAT[0], "content": ["Hi"]}], "task.messages: the content of a message holds"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_used(tmp_path, messages, message):
    assert refusal(chat(tmp_path, messages)).startswith(message)


def test_every_other_column_reaches_the_rewards(tmp_path):
    """Columns that are called like what a reward function gets anyway have another name there."""
    taken = {
        "prompt": "p",
        "completion": "c",
        "references": ["r"],
        "prompts": 1,
        "completion_ids": 2,
        "data_prompt": 3,
        "log_metric": 4,
    }
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], **taken}, ROWS[2], ROWS[3]])
    rows = load_task("columns", single(path)).train
    assert rows["prompt"][0] == "Wer ist Nr. 0?" and rows["references"][0] == ["Jürgen 0"]
    renamed = {"data_data_prompt": "p", "data_prompt": 3, "data_completion": "c", "data_references": ["r"]}
    assert {name: rows[1][name] for name in renamed} == renamed
    assert rows[0]["data_completion"] is None  # a column that only some rows have

    def reward(prompts, completions, completion_ids, references, question, n, data_prompts, **others):
        assert others.keys() - TRAINER_ARGUMENTS == {"answer", *renamed, "data_completion_ids", "data_log_metric"}
        return [float(value) for value in n]

    values = {name: rows[name][:] for name in rows.column_names if name not in ("prompt", "completion")}
    values["completion_ids"] = [[1], [2]]
    scores = compute_rewards([Reward("r", reward)], rows["prompt"][:], ["a", "b"], values)
    assert scores.weighted_sum.tolist() == [0, 1]


def test_a_mapped_column_of_a_taken_name_is_no_clash(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "references": ["c", "d"]}] * 3)
    keys = {"prompt": "> {prompt}", "completion": "completion", "references": "references"}
    example = load_task("columns", single(path, **keys)).train[0]
    assert (example["prompt"], example["completion"], example["references"]) == ("> p", "c", ["c", "d"])
    assert example["data_prompt"] == "p"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "{qestion}"}, "task.prompt: no column 'qestion' in '/train.jsonl'; did you mean 'question'?"),
        ({"prompt": "{question.x[0]} {m[x]}"}, "task.prompt: no column 'm'"),
        ({"completion": "zzz"}, "task.completion: no column 'zzz' in '/train.jsonl'; there are: question, "),
        ({"references": "answers"}, "task.references: no column 'answers'"),
        ({"prompt": None, "completion": None, "messages": "chat"}, "task.messages: no column 'chat'"),
    ],
)  # fmt: skip
def test_missing_columns(folder, change, message):
    assert refusal(config(folder, **change)).replace(str(folder), "").startswith(message)


@pytest.mark.parametrize(
    ("answer", "keys", "message"),
    [
        (None, {}, "task.completion: the column 'answer' is null or missing, expected a text, in line 1 of '/data."),
        (5, {}, "task.completion: the column 'answer' holds a number"),
        (["a"], {}, "task.completion: the column 'answer' holds a list"),
        ({"a": 1}, {"completion": "<{answer}>"}, "task.completion: {answer} holds a mapping"),
        (None, {"prompt": "{answer}"}, "task.prompt: {answer} is null"),
        (["a"], {"prompt": "{answer[1]}"}, "task.prompt: {answer[1]} is missing"),
        ("ab", {"prompt": "{answer[0]}"}, "task.prompt: {answer[0]} reaches into a text"),
        ({"b": ["ab"]}, {"prompt": "{answer[b][0][0]}"}, "task.prompt: {answer[b][0][0]} reaches into"),
        ("x", {"prompt": "{answer:.2f}"}, "task.prompt: the template '{answer:.2f}' cannot"),
        (" \n", {"prompt": "answer"}, "task.prompt: the prompt is blank"),
        ([], {"references": "answer"}, "task.references: the column 'answer' is an empty list"),
        (["a", 1], {"references": "answer"}, "task.references: the list in the column"),
        (None, {"references": "{answer}"}, "task.references: {answer} is null"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used(tmp_path, answer, keys, message):
    row = {"question": "q", "answer": answer}
    keys = {"completion": None, **keys} if "references" in keys else keys
    assert row_refusal(tmp_path, row, **keys).startswith(message)


def test_the_first_three_places_are_named(tmp_path):
    good, bad = ROWS[0], {"question": "q"}
    message = row_refusal(tmp_path, good, bad, good, bad, {"question": "q", "answer": None}, bad, bad)
    assert message.endswith("in lines 2, 4, 5 and 2 more of '/data.jsonl'")
    Dataset.from_list([good, {**bad, "answer": None, "n": 1}, good, good]).to_parquet(str(tmp_path / "a.parquet"))
    assert "in row 1 of " in refusal(single(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text('question,answer\n"over\ntwo lines",x\n,y\n\nq,z\nq,z\n')
    assert "blank, in line 4 of " in refusal(single(tmp_path / "a.csv"))


def test_only_rows_that_are_used_have_to_be_good(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], {"question": None}, ROWS[1], ROWS[2]])
    assert len(load_task("columns", single(path, max_train_examples=1)).train) == 1
    assert "line 2" in refusal(single(path))


@pytest.mark.parametrize("end", ["\n", "\n\n"])
def test_a_travelling_column_of_several_types_stays_as_it_is(tmp_path, end):
    """Also where `datasets` cannot read the file, here for its blank lines."""
    path = tmp_path / "data.jsonl"
    rows = zip(ROWS[:4], [1, [1], "x", None], strict=True)
    path.write_text("".join(json.dumps({**row, "id": key}) + end for row, key in rows))
    assert load_task("columns", single(path)).train["id"][:] == [1, [1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "task: set exactly one of prompt and messages"),
        ({"messages": "chat"}, "task: set exactly one of prompt and messages"),
        ({"completion": None}, "task: set completion or references"),
        ({"prompt": None, "messages": "chat"}, "task.completion: it would do nothing"),
        ({"system": "Be brief.", "chat": False}, "task.system: it would do nothing"),
        ({"chat": "yes"}, "task.chat: 'yes' is not one of"),
        ({"messages_from": {"customer": "user"}}, "task.messages_from: it maps neither"),
        ({"prompt": "{question"}, "task.prompt: the template '{question' is not"),
        ({"prompt": "{}"}, "task.prompt: '{}' names no column"),
        ({"completion": ""}, "task.completion: '' names no column"),
        ({"path": " "}, "task.path: empty"),
        ({"max_test_examples": 0}, "task.max_test_examples: must be at least 1, found 0"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused_before_any_file_is_read(folder, change, message):
    with pytest.raises(TaskError) as raised:
        config(folder, **change)
    assert str(raised.value).startswith(message)


def test_a_recipe_with_columns(folder):
    text = (
        "name: demo\nmodel: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400}}\n"
        f"task:\n  name: columns\n  path: {folder}/{{split}}.jsonl\n  prompt: 'Frage: {{question}}\\n'\n"
        "  completion: answer\nppo: {rewards: [bleu], response_length: 8}\n"
    )
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml", [f"output_dir={folder}"])
    check_recipe(recipe)
    assert len(load_task(recipe.task.name, recipe.task.config).train) == 4
    with pytest.raises(RecipeError, match=r"recipe\.yaml:6: task\.promt: unknown key; did you mean 'prompt'\?"):
        (folder / "recipe.yaml").write_text(text.replace("prompt:", "promt:"))
        load_recipe(folder / "recipe.yaml")
