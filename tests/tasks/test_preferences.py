"""Preference data by its columns: texts, chats, margins, and what is refused with the rows it is in."""

import json

import pytest

from pipeline.tasks.preferences import Config, Preference, PromptForm, files, load
from pipeline.tasks.types import TaskError

ROW = {"prompt": "p", "chosen": "good", "rejected": "bad"}
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "good"), ("assistant", "bad")))


@pytest.fixture
def data(tmp_path):
    """Each call writes both splits and gives the config of their columns."""

    def write(*rows, validation=None, **keys) -> Config:
        for split, content in (("train", rows), ("validation", validation or [{**rows[0]}])):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return Config(path=str(tmp_path / "{split}.jsonl"), **keys)

    return write


def test_texts_by_column_and_template(data):
    row = {"source": "a dog", "better": "ein Hund", "worse": "Hund", "by": 3}
    config = data(row, prompt="{source}\n", chosen="better", rejected="worse", margin="by")
    assert load(config).train == [Preference("a dog\n", "ein Hund", "Hund", 3.0)]
    assert [path.name for path in files(config)] == ["train.jsonl", "validation.jsonl"]


def test_chats_with_a_prompt_column_and_without_one(data):
    expected = [Preference([USER], "good", "bad")]
    assert load(data({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})).train == expected
    assert load(data({"prompt": [USER], "chosen": "good", "rejected": [USER, BAD]})).train == expected
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert load(data(whole, prompt=None)).train == expected


def test_a_part_of_one_file_and_a_limit(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({**ROW, "prompt": f"p{n}"}) + "\n" for n in range(10)))
    config = Config(path=str(path), train="train[:80%]", validation="train[80%:]", max_train_pairs=3)
    loaded = load(config)
    assert [p.prompt for p in loaded.train] == ["p0", "p1", "p2"]
    assert [p.prompt for p in loaded.validation] == ["p8", "p9"]


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (
            {"margin": -2},
            {"margin": "margin"},
            "the margin is negative \\(-2\\), as if chosen and rejected were swapped",
        ),
        ({"margin": None}, {"margin": "margin"}, "the margin is not a finite number \\(None\\)"),
        ({"margin": "x"}, {"margin": "margin"}, "the margin is not a finite number"),
        ({"margin": 10**400}, {"margin": "margin"}, "the margin is not a finite number"),
        ({"chosen": None}, {}, "the column 'chosen' is null or missing"),
        ({}, {"chosen": "chose"}, "reward.pairs.chosen: no column 'chose' in .*; did you mean 'chosen'\\?"),
        ({"prompt": str([USER])}, {}, "the column 'prompt' holds a list of messages written as text"),
        ({"chosen": str([USER, GOOD])}, {}, "the column 'chosen' holds a list of messages written as text"),
        ({"chosen": [USER]}, {}, "'chosen' does not end with a message of the role assistant"),
        ({}, {"prompt": None}, "without a prompt column, chosen and rejected must be chats"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "ho"}, BAD]},
            {"prompt": None},
            "chosen and rejected differ before their last message",
        ),
    ],
)
def test_rows_that_give_no_pair(data, row, keys, message):
    config = data({**ROW, **row}, **keys)
    with pytest.raises(TaskError, match=message) as raised:
        load(config)
    assert str(raised.value).startswith("reward.pairs.")


def test_what_is_missing_names_the_section(tmp_path):
    config = Config(path=str(tmp_path / "{split}.jsonl"))
    with pytest.raises(
        TaskError, match=r"^reward\.pairs\.path: no file '.*train\.jsonl' .*set reward\.pairs\.data_dir"
    ):
        files(config)
    with pytest.raises(TaskError, match=r"^reward\.pairs\.min_margin: it would do nothing"):
        Config(path="x.jsonl", min_margin=1.0)
    with pytest.raises(TaskError, match=r"^reward\.pairs\.max_train_pairs: must be at least 1"):
        Config(path="x.jsonl", max_train_pairs=0)


CHAT_PAIR = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
SYSTEM = {"role": "system", "content": "Be brief."}
TRANSCRIPT = {side: f"\n\nHuman: hi\n\nAssistant: {text}" for side, text in (("chosen", "good"), ("rejected", "bad"))}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", **CHAT_PAIR},
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], **CHAT_PAIR},
        CHAT_PAIR,
        TRANSCRIPT,
        {"prompt": "hi", "chosen": "hi good", "rejected": " hi\nbad"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", **TRANSCRIPT},
        {
            "prompt": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
)
def test_pairs_of_every_form_have_the_prompts_of_a_task_of_chats(data, row):
    form = PromptForm(chat=True, system="Be brief.")
    assert load(data(row), form).train == [Preference([SYSTEM, USER], "good", "bad")]


def test_answers_that_begin_as_the_prompt_by_chance_stay_whole(data):
    rows = [
        {"prompt": "hi", "chosen": "hi good", "rejected": "hi bad"},
        {"prompt": "hi", "chosen": "hi good", "rejected": "bad"},
    ]
    assert [pair.chosen for pair in load(data(*rows)).train] == ["hi good"] * 2
    assert load(data(rows[0])).train == [Preference("hi", "good", "bad")]


def test_a_transcript_is_read_as_its_turns(data):
    prompt = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: Assistant: is a word\n\nAssistant:"
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "Assistant: is a word")]
    row = {"prompt": prompt, "chosen": "good", "rejected": "bad"}
    [pair] = load(data(row), PromptForm(chat=True)).train
    assert pair.prompt == [{"role": role, "content": text} for role, text in turns]
    question = {**row, "prompt": "Human: a word. Assistant: another?"}
    [pair] = load(data(question), PromptForm(chat=True)).train
    assert pair.prompt == [{"role": "user", "content": question["prompt"]}]


def test_tools_and_the_column_system_are_read_as_in_a_task(data):
    tools = [{"name": "north"}]
    row = {"prompt": "hi", "chosen": "good", "rejected": "bad", "tools": tools}
    assert load(data(row), PromptForm(True, None, "tools")).train[0].prompt == [{**USER, "tools": tools}]
    assert load(data(row), PromptForm(True)).train[0].prompt == [USER]
    for prompt in ("hi", [USER], [{"from": "human", "value": "hi"}]):
        row = {"prompt": prompt, "chosen": "good", "rejected": "bad", "system": "Be short."}
        [pair] = load(data(row), PromptForm(True, "Be brief.")).train
        assert pair.prompt == [{**SYSTEM, "content": "Be short."}, USER]
    [pair] = load(data(row | {"prompt": "hi"}, prompt="{system} {prompt}"), PromptForm(True)).train
    assert pair.prompt == [{**USER, "content": "Be short. hi"}]


def test_the_beginning_of_the_chats_is_the_prompt_where_the_column_is_a_part_of_it(data):
    start = [USER, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
    row = {"prompt": "hi", "chosen": [*start, GOOD], "rejected": [*start, BAD]}
    assert load(data(row)).train[0].prompt == start
    with pytest.raises(TaskError, match=r"^reward\.pairs\.chosen: the prompt is not what the chats .* prompt: null"):
        load(data({**row, "prompt": "hello"}))


def test_transcripts_for_a_task_of_plain_texts(data):
    pair = load(data(TRANSCRIPT), PromptForm(chat=False)).train[0]
    assert (pair.prompt, pair.chosen) == ("\n\nHuman: hi\n\nAssistant:", "good")
    other = {**TRANSCRIPT, "rejected": TRANSCRIPT["rejected"].replace("hi", "ho")}
    with pytest.raises(TaskError, match="differ before the last Assistant"):
        load(data(other))


def test_chats_for_a_task_of_plain_texts_are_refused(data):
    with pytest.raises(TaskError, match=r"those of the task are plain texts.* chat: true .* line 1 of"):
        load(data(CHAT_PAIR), PromptForm(chat=False))
