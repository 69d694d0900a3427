"""The transcripts of docs/: every command runs in an empty folder, and what it prints has the lines that are shown."""

import re
import shlex
from pathlib import Path

from pipeline.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
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


def transcript(page: str) -> list[tuple[list[str], list[str]]]:
    """The commands of a page's consoles as words, each with the lines that it prints there."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((shlex.split(line[2:]), []))
            else:
                commands[-1][1].append(line)
    return commands


def without_figures(line: str) -> str:
    """A line with `#` for each number, and without the plural of what is counted."""
    return re.sub(r"(?<=\w)s\b", "", re.sub(r"\d[\d.,]*", "#", line))


def check_lines(command: str, shown: list[str], printed: list[str]) -> None:
    """Compare all lines, or the last alone where a run that is cut short has other things to say."""
    if command == "generate":
        assert len(printed) == len(shown) == 1
    elif command in ("run", "report"):
        assert printed[-1] == shown[-1]
    else:
        assert [without_figures(line) for line in printed] == [without_figures(line) for line in shown]


def test_from_the_wheel_to_a_report(tmp_path, monkeypatch, capfd, fresh_accelerate):
    monkeypatch.chdir(tmp_path)
    commands = transcript("transcript.md")
    assert {words[1] for words, _ in commands} >= {"recipes", "check", "run", "report", "generate", "export"}
    for words, shown in commands:
        program, command, *rest = words
        overrides = SHORT if command in ("run", "check") else []
        assert program == "relay" and main([command, *rest, *overrides]) == 0, words
        check_lines(command, shown, capfd.readouterr().out.splitlines())
    assert (tmp_path / "my_model" / "model.safetensors").is_file()
