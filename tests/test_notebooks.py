"""notebooks/: stored without outputs, and every cell of each runs, shortened by overrides, in an empty folder."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.models.from_scratch import build_from_scratch

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = (
    "task.max_train_examples=64 task.max_validation_examples=8 task.max_test_examples=12 sft.num_train_epochs=1 "
    "sft.per_device_train_batch_size=8 ppo.total_episodes=32 ppo.per_device_train_batch_size=8 "
    "ppo.gradient_accumulation_steps=1 eval.n_bootstrap=10"
)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def test_there_is_a_notebook_for_a_cpu_for_a_gpu_and_for_a_reward():
    assert [path.stem for path in NOTEBOOKS] == ["one_gpu", "own_reward", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_stored(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert all((ROOT / name).is_file() for name in re.findall(r"\b(?:docs|recipes)/\w+\.(?:md|py)", text))


@pytest.fixture
def tiny(scratch_config, tmp_path) -> Path:
    """A model of a few thousand weights with room for whole sentences, in place of the pretrained one."""
    config = replace(scratch_config, max_position_embeddings=256)
    return build_from_scratch(config, ["Translate to German: a book", "ein Buch"], 0, tmp_path / "tiny")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    overrides = SHORT
    if path.stem == "one_gpu":
        overrides += f" model.model_name_or_path={tiny} model.lora_r=4 task.ppo_examples=16 ppo.response_length=16"
    notebook = read(path)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.source.endswith('OVERRIDES = ""')
    parameters.source = f"OVERRIDES = {overrides!r}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert f"report: runs/{'one_gpu' if path.stem == 'one_gpu' else 'quickstart'}/eval/report.html" in printed
    assert "error:" not in printed and "No verdict" in printed
    if path.stem == "own_reward":
        assert "reward/my_rewards.right_length" in printed and "1.00  Der alte Mann" in printed
