"""Chats in the shapes that data sets have: tool calls, ShareGPT, names of their own, TRL's rows, plain columns."""

import csv
import json

import pytest
from column_data import refusal, single, write_lines

from pipeline.tasks import TaskError, load_task
from pipeline.tasks.columns import thoughts_warning
from pipeline.tasks.parallel import Config as ParallelConfig

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]


def first(tmp_path, *rows, **keys):
    """The first of the examples of some rows, or of one row three times."""
    path = write_lines(tmp_path / "data.jsonl", rows if len(rows) > 1 else rows * 3)
    return load_task("columns", single(path, **{"prompt": None, "completion": None, **keys})).train[0]


def test_tool_calls_and_tools_are_kept(tmp_path):
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1"}
    row = {"chat": [USER, called, result, {**called, "content": "I add."}], "tools": TOOLS}
    others = [{"chat": [USER, {**ANSWER, "content": text}], "tools": None} for text in ("4", "four")]
    example = first(tmp_path, row, *others, messages="chat")
    function = {"name": "add", "arguments": {"a": 2}}  # a mapping, as chat templates expect
    calls = [{**CALL, "function": function}]
    assert example["prompt"] == [{**USER, "tools": TOOLS}, {**called, "tool_calls": calls}, result]
    assert example["completion"] == [{**called, "content": "I add.", "tool_calls": calls}]
    assert example["references"] == []  # what the model's template makes of the call
    text = first(tmp_path, *others, row, messages="chat", tools=None)
    assert text["prompt"] == [USER] and text["references"] == ["4"]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_may_be_json(tmp_path, tools):
    assert first(tmp_path, {"m": [USER, ANSWER], "tools": tools}, messages="m")["prompt"] == [{**USER, "tools": TOOLS}]


def test_messages_written_as_text_are_refused_with_what_to_do(tmp_path):
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["m"], *[[json.dumps([USER, ANSWER])]] * 3])
    keys = {"prompt": None, "completion": None, "messages": "m"}
    for path in (tmp_path / "data.csv", write_lines(tmp_path / "data.jsonl", [{"m": json.dumps([USER, ANSWER])}] * 3)):
        message = refusal(single(path, **keys))
        assert message.startswith("task.messages: the column 'm' holds a list of messages written as text")
        assert ".jsonl" in message and "json.loads" in message and "line" in message
    assert "expected a list of messages" in refusal(
        single(write_lines(tmp_path / "b.jsonl", [{"m": "x"}] * 3), **keys)
    )


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("key", ["prompt", "completion", "references"])
def test_messages_written_as_text_are_no_text_of_a_prompt_or_an_answer(tmp_path, key, write):
    row = {"prompt": "2 + 2?", "completion": "4", "references": "4"} | {key: write([USER, ANSWER])}
    path = write_lines(tmp_path / "data.jsonl", [row] * 3)
    message = refusal(single(path, prompt="prompt", completion="completion", references="references"))
    assert message.startswith(f"task.{key}: the column {key!r} holds a list of messages written as text")
    assert "json.loads" in message and "ast.literal_eval" in message
    template = {"prompt": "prompt", "completion": "completion", "references": "references", key: f"{{{key}}} "}
    assert load_task("columns", single(path, **template)).train  # whoever means the braces can say so


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"m": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, {"messages": "m"}),
        ({"m": [USER, ANSWER]}, {"messages": "m"}),
        ({"prompt": [USER], "completion": "4"}, {"prompt": "prompt", "completion": "completion"}),
        ({"q": "2 + 2?", "a": "4"}, {"prompt": "{q}\n", "completion": "a", "chat": True}),
    ],
)
def test_chats_begin_with_the_column_system(tmp_path, row, keys):
    example = first(tmp_path, {**row, "system": "Be brief."}, **keys, system="Other.")
    assert (example["prompt"], example["completion"]) == ([SYSTEM, USER], "4")
    for nothing in (None, " ", 3):
        example = first(tmp_path, {**row, "system": nothing}, **keys, system="Be brief.")
        assert example["prompt"] == [SYSTEM, USER]


@pytest.mark.parametrize(
    "keys", [{"prompt": "{system}\n{q}", "completion": "q"}, {"prompt": "q", "references": "system"}]
)
def test_a_column_system_that_is_read_otherwise_is_no_message(tmp_path, keys):
    example = first(tmp_path, {"q": "2 + 2?", "system": "Add."}, **keys, chat=True)
    assert [message["role"] for message in example["prompt"]] == ["user"]


def test_names_of_the_data_are_mapped(tmp_path):
    turns = [{"who": "customer", "text": "2 + 2?"}, {"who": "agent", "text": "4"}]
    names = {"role": "who", "content": "text", "customer": "user", "agent": "assistant"}
    assert first(tmp_path, {"m": turns}, messages="m", messages_from=names)["prompt"] == [USER]
    path = write_lines(tmp_path / "data.jsonl", [{"m": turns}] * 3)
    keys = {"prompt": None, "completion": None, "messages": "m"}
    assert "task.messages_from" in refusal(single(path, **keys))
    message = refusal(single(path, **keys, messages_from={key: names[key] for key in ("role", "content", "agent")}))
    assert "'customer'" in message and "{role: who, content: text, agent: assistant, customer: user}" in message


@pytest.mark.parametrize("names", [None, {"role": "from", "content": "value", "function_call": "assistant"}])
def test_the_advice_for_an_unknown_role_of_sharegpt_can_be_followed(tmp_path, names):
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "function_call", "value": "add"}]
    path = write_lines(tmp_path / "data.jsonl", [{"m": [*turns, {"from": "gpt", "value": "4"}]}] * 3)
    keys = {"prompt": None, "completion": None, "messages": "m", "messages_from": names}
    if names is None:
        assert "{role: from, content: value, function_call: assistant}" in refusal(single(path, **keys))
        return
    example = load_task("columns", single(path, **keys)).train[0]
    assert example["prompt"] == [USER, {"role": "assistant", "content": "add"}]


@pytest.mark.parametrize(("role", "meant"), [("human", "user"), ("prompter", "user"), ("gpt", "assistant")])
def test_names_of_sharegpt_in_messages_of_a_role_are_refused_with_what_maps_them(tmp_path, role, meant):
    turns = [USER, ANSWER, USER, ANSWER]
    turns[0 if meant == "user" else 1] = {**turns[0 if meant == "user" else 1], "role": role}
    path = write_lines(tmp_path / "data.jsonl", [{"m": turns}] * 3)
    keys = {"prompt": None, "completion": None, "messages": "m"}
    assert f"{{role: role, content: content, {role}: {meant}}}" in refusal(single(path, **keys))
    names = {"role": "role", "content": "content", role: meant}
    example = load_task("columns", single(path, **keys, messages_from=names)).train[0]
    assert example["prompt"] == [USER, ANSWER, USER]


def test_a_null_value_of_sharegpt_is_an_empty_content(tmp_path):
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": None}]
    path = write_lines(tmp_path / "data.jsonl", [{"m": turns}] * 3)
    message = refusal(single(path, prompt=None, completion=None, messages="m"))
    assert "content of a message is null" in message and "messages_from" not in message


@pytest.mark.parametrize("column", ["m", "completion"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "mood"])
def test_thoughts_that_are_left_out_are_reported(tmp_path, key, column):
    rows = [{column: [USER, {**ANSWER, **({key: "two and two"} if number else {})}]} for number in range(4)]
    rows = [{"prompt": [USER], **row} for row in rows]
    keys = {"messages": "m", "prompt": None} if column == "m" else {"prompt": "prompt"}
    config = single(
        write_lines(tmp_path / "data.jsonl", rows), **{"completion": None if column == "m" else column, **keys}
    )
    warning = thoughts_warning(config, load_task("columns", config).train)
    if key == "mood":
        assert warning is None
    else:
        assert f"task.{'messages' if column == 'm' else column}: {key!r} of the messages is left out" in warning


@pytest.mark.parametrize("tools", [["hammer"], "a hammer"])
def test_a_column_tools_of_something_else_is_named(tmp_path, tools):
    path = write_lines(tmp_path / "data.jsonl", [{"m": [USER, ANSWER], "tools": tools}] * 3)
    keys = {"prompt": None, "completion": None, "messages": "m"}
    assert "task.tools: null" in refusal(single(path, **keys))
    assert load_task("columns", single(path, **keys, tools=None)).train[0]["prompt"] == [USER]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"m": [USER, {**ANSWER, "content": ""}]}, {"messages": "m"}),
        ({"m": [USER, {"role": "assistant", "content": None}]}, {"messages": "m"}),
        ({"q": "2 + 2?", "a": " "}, {"prompt": "q", "completion": "a"}),
        ({"q": "2 + 2?", "a": [""]}, {"prompt": "q", "references": "a"}),
        ({"p": [USER], "c": [{**ANSWER, "content": "\n"}]}, {"prompt": "p", "completion": "c"}),
    ],
)
def test_an_empty_completion_is_an_error_of_its_row(tmp_path, row, keys):
    good = {**row, **({"m": [USER, ANSWER]} if "m" in row else {"a": "4", "c": [ANSWER]})}
    if isinstance(row.get("a"), list):
        good["a"] = ["4"]
    path = write_lines(tmp_path / "data.jsonl", [good, {**row}, good, good])
    keys = {"prompt": None, "completion": None, **keys}
    message = refusal(single(path, **keys))
    assert "line 2 of" in message and ("empty" in message or "null" in message)
    task = load_task("columns", single(path, **keys, skip_broken_rows=True))
    assert len(task.train) == 1 and len(task.left_out) == 1


@pytest.mark.parametrize("answer", [[ANSWER], "4"])
def test_rows_of_trl_with_a_prompt_of_messages(tmp_path, answer):
    example = first(tmp_path, {"prompt": [SYSTEM, USER], "answer": answer}, prompt="prompt", completion="answer")
    assert (example["prompt"], example["completion"], example["references"]) == ([SYSTEM, USER], "4", ["4"])


def test_messages_before_the_last_answer_belong_to_the_prompt(tmp_path):
    more = [{"role": "assistant", "content": "Sure?"}, USER, ANSWER]
    example = first(tmp_path, {"p": [USER], "c": more}, prompt="p", completion="c", system="Be brief.")
    assert (example["prompt"], example["completion"]) == ([SYSTEM, USER, *more[:2]], "4")


@pytest.mark.parametrize("prompt", ["2 + 2?\n", [USER], [SYSTEM, USER]])
@pytest.mark.parametrize("start", [[], [SYSTEM]])
def test_a_completion_that_is_the_whole_chat_does_not_repeat_the_prompt(tmp_path, prompt, start):
    """As in UltraFeedback: `prompt` is a text, and `chosen` the chat with it."""
    row = {"prompt": prompt, "chosen": [*start, USER, ANSWER]}
    example = first(tmp_path, row, prompt="prompt", completion="chosen", chat=True)
    system = [SYSTEM] if start or prompt == [SYSTEM, USER] else []
    assert (example["prompt"], example["completion"]) == ([*system, USER], "4")


def test_a_prompt_that_holds_an_answer_is_refused(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"p": [USER, ANSWER], "a": "4"}] * 3)
    message = refusal(single(path, prompt="p", completion=None, references="a"))
    assert "ends with a message of the assistant" in message and "task.messages" in message


def test_plain_columns_as_turns(tmp_path):
    row = {"q": "2 + 2?", "a": "4"}
    chats = first(tmp_path, row, prompt="{q}\n", completion="a", chat=True, system="Be brief.")
    assert (chats["prompt"], chats["completion"], chats["references"]) == ([SYSTEM, USER], "4", ["4"])
    assert first(tmp_path, row, prompt="{q}\n", completion="a")["prompt"] == "2 + 2?\n"


def test_parallel_text_as_turns(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.en").write_text("a\n\nb\n")
        (tmp_path / f"{split}.de").write_text("x\ny\nz\n")
    keys = {"source": "{split}.en", "target": "{split}.de", "data_dir": str(tmp_path)}
    task = load_task("parallel", ParallelConfig(**keys, chat=True, system="Translate."))
    assert task.train[0]["prompt"] == [{**SYSTEM, "content": "Translate."}, {"role": "user", "content": "a"}]
    assert task.where("train", [1]).startswith("line 3 of ")
    with pytest.raises(TaskError, match=r"task\.system: it would do nothing"):
        ParallelConfig(**keys, chat=False, system="Translate.")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"i": "Do it.", "x": "here", "o": "y"}, "Do it.\nhere\n"),
        ({"i": "Do it.", "x": "", "o": "y"}, "Do it.\n"),
        ({"i": "Do it.", "x": None, "o": "y"}, "Do it.\n"),
        ({"i": "Do it.", "o": "y"}, "Do it.\n"),
    ],
)
def test_a_line_that_is_an_empty_field_is_left_out(tmp_path, row, prompt):
    full = {"i": "Do it.", "x": "there", "o": "y"}
    assert first(tmp_path, row, full, full, prompt="{i}\n{x}\n", completion="o")["prompt"] == prompt
    assert first(tmp_path, row, full, full, prompt="{i}\n{x}", completion="o")["prompt"] == prompt.rstrip()


def test_a_line_with_more_than_an_empty_field_is_refused(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"i": "Do it.", "x": None, "o": "y"}] * 3)
    assert "task.prompt: {x} is null" in refusal(single(path, prompt="{i}\nInput: {x}", completion="o"))
    assert "task.prompt: {x} is null" in refusal(single(path, prompt="Input:\n{x}", completion="o"))


@pytest.mark.parametrize("values", [(10**400, 1, 2), (2**64, "x", None), ({"": 1}, [1], "s")])
def test_a_column_that_nobody_uses_cannot_refuse_the_data(tmp_path, values):
    rows = [{"q": "2 + 2?", "a": "4", "n": value} for value in values]
    assert first(tmp_path, *rows, prompt="q", completion="a")["completion"] == "4"


def test_examples_of_rows_that_are_left_out_keep_their_places(tmp_path):
    rows = [{"q": f"{n}?" if n % 3 else None, "a": str(n)} for n in range(9)]
    path = write_lines(tmp_path / "data.jsonl", rows)
    task = load_task("columns", single(path, prompt="q", completion="a", skip_broken_rows=True, ppo_examples=2))
    assert task.train["a"][:] == ["1", "2"] and task.where("train", [1]).startswith("line 3 of ")
    assert task.ppo_prompts["a"][:] == ["4", "5"] and task.where("ppo_prompts", [1]).startswith("line 6 of ")
