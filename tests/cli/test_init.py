"""relay init: a recipe from four answers or from options, which is read and shown by the code of the stages."""

import builtins
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from pipeline.cli.main import main
from pipeline.models.loading import load_tokenizer
from pipeline.models.text import encode_prompts
from pipeline.recipe import load_recipe
from pipeline.tasks import load_task

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def questions() -> list[dict]:
    """Thirty rows of a question and an answer, in questions.csv."""
    rows = [{"question": f"say north {number}", "answer": f"north, {number}"} for number in range(30)]
    Dataset.from_list(rows).to_csv("questions.csv")
    return rows


def splits(file: str) -> list[int]:
    """How many rows the task of a recipe has in each split."""
    recipe = load_recipe(file)
    task = load_task(recipe.task.name, recipe.task.config)
    return [len(task.train), len(task.validation), len(task.test)]


def test_a_csv_becomes_a_recipe_that_can_run(questions, capsys):
    assert main(["init", "qa.yaml", "--model", "scratch", "--data", "questions.csv"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:4] == ["the first prompt:", "  say north 0", "its reference:", "  north, 0"]
    assert "reward rougeL: 1.000 for the reference, 0.000 for an empty answer" in lines
    assert "tokens: " in captured.out and lines[-1].startswith("wrote qa.yaml; next: relay check qa.yaml")
    assert splits("qa.yaml") == [24, 3, 3]
    text = Path("qa.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line.strip().startswith(("prompt", "completion", "total")))
    assert main(["check", "qa.yaml"]) == 0 and "qa.yaml -> runs/qa" in capsys.readouterr().out


def test_the_tokens_and_the_rendered_chat_are_those_of_the_model(questions, base_directory, model_config, capsys):
    model = Path("chat_model")
    tokenizer = load_tokenizer(base_directory, model_config)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text((base_directory / "config.json").read_text())
    rows = [
        {"conversations": [{"from": "human", "value": r["question"]}, {"from": "gpt", "value": r["answer"]}]}
        for r in questions
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "chat_model", "--data", "chats.jsonl", "--reward", "chrf", "token_f1"]
    assert main(["init", "chat.yaml", *words]) == 0
    text = capsys.readouterr().out
    assert "  [user] say north 0</s>[assistant]" in text and text.count("reward ") == 2
    recipe = load_recipe("chat.yaml")
    assert (recipe.task.config.messages, recipe.model.model_name_or_path) == ("conversations", "chat_model")
    assert [reward.name for reward in recipe.ppo.rewards] == ["chrf", "token_f1"]
    assert [metric.name for metric in recipe.eval.metrics] == ["chrf", "token_f1"]
    [ids] = encode_prompts(tokenizer, [[{"role": "user", "content": "say north 0"}]])
    assert f"tokens: {len(ids)} of the prompt, " in text


def test_a_model_that_is_not_here_is_said_and_the_recipe_is_written(questions, capsys):
    assert main(["init", "--model", "nobody/nothing", "--data", "questions.csv"]) == 0
    text = capsys.readouterr().out
    assert "tokens: not shown, because model.model_name_or_path: 'nobody/nothing'" in text
    assert "  say north 0" in text and load_recipe("recipe.yaml").model.model_name_or_path == "nobody/nothing"


def test_a_tool_call_of_a_model_that_is_not_here_is_shown_as_it_is(capsys):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = [{"role": "user", "content": "say north"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    Path("calls.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 10)
    assert main(["init", "--model", "nobody/nothing", "--data", "calls.jsonl"]) == 0
    text = capsys.readouterr().out
    assert '"name": "add"' in text and "rewards: not tried, because the chat template" in text


def test_two_files_of_parallel_text_are_split(capsys):
    for side in ("en", "de"):
        Path(f"corpus.{side}").write_text("".join(f"{side} text of line {number}\n" for number in range(20)))
    assert main(["init", "mt.yaml", "--model", "scratch", "--data", "corpus.en", "corpus.de"]) == 0
    assert "reward bleu: 1.000 for the reference" in capsys.readouterr().out
    assert splits("mt.yaml") == [16, 2, 2] and load_recipe("mt.yaml").language == "de"
    assert Path("mt_data/test.en").read_text() == "en text of line 18\nen text of line 19\n"
    Path("corpus.de").write_text("one line\n")
    assert main(["init", "other.yaml", "--model", "scratch", "--data", "corpus.en", "corpus.de"]) == 2
    assert "has 20 lines and 'corpus.de' has 1" in capsys.readouterr().err and not Path("other_data").exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_of_splits_are_found_beside_the_training_file(ending, questions):
    Path("data").mkdir()
    for split, size in (("train", 20), ("dev", 4), ("test", 3)):
        rows = Dataset.from_list(questions[:size])
        rows.to_json(f"data/{split}.jsonl") if ending == "jsonl" else rows.to_parquet(f"data/{split}.parquet")
    assert main(["init", "work/my.yaml", "--model", "scratch", "--data", f"data/train.{ending}"]) == 0
    assert splits("work/my.yaml") == [20, 4, 3]
    config = load_recipe("work/my.yaml").task.config
    assert (config.path, config.validation) == (f"../data/{{split}}.{ending}", "dev")


def test_parallel_files_of_splits_and_of_alpaca_rows(capsys):
    for split in ("train", "validation", "test"):
        for side in ("en", "de"):
            Path(f"{split}.{side}").write_text(f"{side} {split}\n" * 3)
    words = ["--data", "{split}.en", "{split}.de", "--task", "prompt=translate: {source}\\n"]
    assert main(["init", "mt.yaml", "--model", "scratch", *words]) == 0
    assert "  translate: en train" in capsys.readouterr().out and splits("mt.yaml") == [3, 3, 3]
    row = {"instruction": "Add one.", "input": "", "output": "It is two words more."}
    Path("alpaca.json").write_text(json.dumps([row] * 10))
    assert main(["init", "alpaca.yaml", "--model", "scratch", "--data", "alpaca.json"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["the first prompt:", "  Add one."]


def test_questions_are_asked_at_a_terminal(questions, monkeypatch, capsys):
    asked, answers = [], iter(["", "questions.csv", "prompt=answer completion=question", "exact_match"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda text: asked.append(text) or next(answers))
    assert main(["init", "asked.yaml"]) == 0
    assert len(asked) == 4 and "[scratch]" in asked[0] and "completion=answer" in asked[2] and "rougeL" in asked[3]
    recipe = load_recipe("asked.yaml")
    assert (recipe.task.config.prompt, recipe.task.config.completion) == ("answer", "question")
    assert recipe.model.from_scratch is not None and recipe.ppo.rewards[0].name == "exact_match"


def test_a_reward_of_ones_own_is_tried_and_one_that_rewards_silence_is_warned_of(questions, capsys):
    Path("mine.py").write_text("def silence(completions, **columns):\n    return [-len(c) for c in completions]\n")
    words = ["--model", "scratch", "--data", "questions.csv", "--reward", "mine.py:silence"]
    assert main(["init", "own.yaml", *words]) == 0
    text = capsys.readouterr().out
    assert "silence: -8.000 for the reference, " in text and "warning: " in text
    assert [metric.name for metric in load_recipe("own.yaml").eval.metrics] == ["rougeL", "chrf"]


WITH_DATA = ["--model", "scratch", "--data", "questions.csv"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["new.yaml", "--model", "scratch"], "stdin is no terminal: give --model and --data"),
        (["new.yaml", "--model", "scratch", "--data", "nowhere.csv"], "--data: no file 'nowhere.csv'"),
        (["new.yaml", "--model", "scratch", "--data", "a.txt"], "--data: 'a.txt' is in no known format"),
        (["new.yaml", "--model", "scratch", "--data", "a.txt", "a.txt", "a.txt"], "--data: give one file, or two"),
        (["new.yaml", "--model", "scratch", "--data", "odd.csv"], "--task: cannot tell which columns"),
        (["new.yaml", *WITH_DATA, "--task", "question"], "--task: write KEY=VALUE"),
        (["new.yaml", *WITH_DATA, "--task", "prompt=quest"], "no column 'quest'"),
        (["new.yaml", *WITH_DATA, "--task", "promt=question"], "task.promt: unknown key"),
        (["new.yaml", *WITH_DATA, "--reward", "rogueL"], "'rougeL'"),
        (["new.yaml", *WITH_DATA, "--reward", "learned"], "--reward learned: it needs a reward section"),
        (["old.yaml", *WITH_DATA], "'old.yaml' exists"),
        (["a b.yaml", *WITH_DATA], "'a b.yaml' names a run too"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_left(words, sentence, questions, folder, capsys):
    Path("a.txt").write_text("text\n")
    Path("old.yaml").write_text("")
    Path("odd.csv").write_text("a,b,c\n1,2,3\n")
    before = sorted(folder.iterdir())
    assert main(["init", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: init: ") and sentence in error and sorted(folder.iterdir()) == before
