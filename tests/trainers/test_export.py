"""The policy that a run leaves loads from any folder, and after the whole run was moved."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "runs.md"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits


@pytest.fixture
def policy(make_trainer, taught, tokenizer, model_config, tmp_path, monkeypatch) -> torch.Tensor:
    """A run in runs/my_run, trained with relative paths as the stages use them; its logits."""
    monkeypatch.chdir(tmp_path)
    taught().save_pretrained("runs/my_run/sft")
    tokenizer.save_pretrained("runs/my_run/sft")
    trainer = make_trainer(
        Path("runs/my_run/ppo").absolute(), model=load_model("runs/my_run/sft", model_config), learning_rate=0.1
    )
    trainer.train()
    trainer.save_model()
    assert (logits(trainer.shared.language_model) - logits(taught())).abs().max() > 0.01
    return logits(trainer.shared.language_model)


def export(folder: Path, run: Path) -> torch.Tensor:
    """Run the command of the docs for a run, in `folder`."""
    (code,) = re.findall(r'^python -c "(.*merge_and_unload.*)"$', DOCS.read_text(), re.MULTILINE)
    code = code.replace("runs/my_run", str(run)).replace("'merged'", repr(str(run / "merged")))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)
    return logits(AutoModelForCausalLM.from_pretrained(run / "merged"))


def test_a_policy_loads_from_any_folder_and_from_a_run_that_was_moved(policy, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "my_run"
    settings = json.loads((run / "ppo" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run / "sft")
    monkeypatch.chdir("/")
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(run / "ppo")), policy, **close)
    torch.testing.assert_close(export(Path("/"), run), policy, **close)
    moved = run.rename(tmp_path / "elsewhere")
    torch.testing.assert_close(export(Path("/"), moved), policy, **close)
    config = ModelConfig("some/model")
    torch.testing.assert_close(logits(load_model(moved / "ppo", config)), policy, **close)
    (moved / "ppo" / "tokenizer_config.json").unlink()
    assert load_tokenizer(moved / "ppo", config).eos_token == "</s>"
