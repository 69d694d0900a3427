"""relay doctor: what it finds, and that its short run is that of the quickstart."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pipeline.cli import doctor_command
from pipeline.cli.main import main
from pipeline.cli.recipe_files import recipe_files
from pipeline.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def row_of(text: str, name: str) -> list[str]:
    """The cells of the row of a table that begins with a name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_versions_machine_and_launch_are_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.cli.doctor_command.default_config_file", str(tmp_path / "default_config.yaml"))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "trl")[1:3] == [version("trl"), doctor_command.tested_versions()["trl"]]
    assert "<1.17" in row_of(text, "trl")[3] and row_of(text, "python")[3] == ">=3.11"
    threads = torch.get_num_threads()
    assert f"torch uses {threads} thread" in row_of(text, "cores")[1] and "free of" in row_of(text, "memory")[1]
    assert row_of(text, "ppo")[1].startswith("1 process on cpu with ") and "bf16" in text and " free in " in text
    assert row_of(text, "accelerate's configuration")[1].startswith("not there") and "--num_processes" in text
    assert row_of(text, "quantization")[1] in ("there", "missing: bitsandbytes") and "dev" in text


def test_the_tested_versions_are_those_of_the_repository():
    assert doctor_command.CONSTRAINTS.resolve() == ROOT / "constraints.txt"
    assert {"torch", "transformers", "trl", "peft"} <= doctor_command.tested_versions().keys()


@pytest.mark.parametrize("code", [0, 1])
def test_the_short_run_is_the_quickstart_in_a_folder_that_goes_away(code, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(doctor_command, "run_chain", lambda *given, is_kept: calls.append((*given, is_kept)) or code)
    assert main(["doctor", "--tests"]) == code
    ((path, overrides, selection, options, is_kept),) = calls
    recipe = load_recipe(path, overrides)
    assert path == recipe_files()["quickstart"] and recipe.task.config.max_train_examples == 64 and not options
    assert not is_kept  # so the chain does not name its report
    assert not Path(recipe.output_dir).exists() and selection == doctor_command.Selection()
    assert ("every stage runs here" in capsys.readouterr().out) == (code == 0)
