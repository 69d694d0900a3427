"""The transcripts of docs/: every command runs in an empty folder, and what it prints has the lines that are shown."""

import json
import re
import shlex
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from pipeline.cli.main import main
from pipeline.models.config import FromScratchConfig
from pipeline.models.from_scratch import build_from_scratch

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "assets" / "init"
SHORT = [
    "task.max_train_examples=64",
    "task.max_validation_examples=8",
    "task.max_test_examples=12",
    "sft.num_train_epochs=2",
    "sft.per_device_train_batch_size=8",
    "ppo.total_episodes=32",
    "ppo.per_device_train_batch_size=8",
    "ppo.gradient_accumulation_steps=1",
    "eval.n_bootstrap=10",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def transcript(heading: str) -> list[tuple[list[str], list[str]]]:
    """The commands in a part of the page as words, each with the lines that it prints there."""
    text = (ROOT / "docs" / "transcript.md").read_text(encoding="utf-8")
    (part,) = [part for part in re.split(r"^## ", text, flags=re.M) if part.startswith(heading)]
    commands = []
    for block in re.findall(r"^```console\n(.*?)^```", part, re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((shlex.split(line[2:]), []))
            else:
                commands[-1][1].append(line)
    return commands


def without_figures(line: str) -> str:
    """A line with `#` for each number, and without the plural of what is counted."""
    return re.sub(r"(?<=\w)s\b", "", re.sub(r"\d[\d.,]*", "#", line))


def check_lines(command: str, shown: list[str], printed: list[str], told: list[str]) -> None:
    """Compare all lines with stdout and notes on stderr, or the last alone where a run that is cut short differs."""
    if command == "generate":
        assert len(printed) == len(shown) == 1
    elif command in ("run", "report"):
        assert printed[-1] == shown[-1]
    elif command == "init":
        notes = shown[: len(shown) - len(printed)]
        assert shown[len(notes) :] == [line.rstrip() for line in printed] and set(notes) <= set(told)
    else:
        assert [without_figures(line) for line in printed] == [without_figures(line) for line in shown]


def chat_model(folder: Path) -> None:
    """A model of a few thousand weights that speaks the chats of the transcript, with a chat template."""
    rows = [json.loads(line)["conversations"] for line in (DATA / "chats.jsonl").read_text().splitlines()]
    config = FromScratchConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    texts = [message["value"] for row in rows for message in row]
    build_from_scratch(config, [*texts, "system: user: assistant: " * 9], 0, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def test_from_the_wheel_to_a_report(tmp_path, monkeypatch, capfd, fresh_accelerate):
    monkeypatch.chdir(tmp_path)
    commands = transcript("A run")
    assert {words[1] for words, _ in commands} >= {"recipes", "check", "run", "report", "generate", "export"}
    for words, shown in commands:
        program, command, *rest = words
        overrides = SHORT if command in ("run", "check") else []
        assert program == "relay" and main([command, *rest, *overrides]) == 0, words
        check_lines(command, shown, capfd.readouterr().out.splitlines(), [])
    assert (tmp_path / "my_model" / "model.safetensors").is_file()


def test_a_recipe_for_your_own_data(tmp_path, monkeypatch, capfd):
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    chat_model(Path("chat_model"))
    capfd.readouterr()
    commands = transcript("A recipe for your own data")
    assert [words[1] for words, _ in commands].count("init") == 3
    for words, shown in commands:
        program, command, *rest = words
        if program in ("head", "cat"):
            lines = Path(words[-1]).read_text(encoding="utf-8").splitlines()
            assert shown == (lines[: int(command[1:])] if program == "head" else lines)
        else:
            assert program == "relay" and main([command, *rest]) == 0, words
            captured = capfd.readouterr()
            check_lines(command, shown, captured.out.splitlines(), captured.err.splitlines())
