"""A small run whose models can be loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from demo_run import recipe_with, write_demo
from peft import get_peft_model

from pipeline.models.adapters import adapter_config
from pipeline.models.loading import load_model, lora_config
from pipeline.recipe import Recipe
from pipeline.stages.directory import RunDirectory

RUN = Path("runs/demo")


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """A folder of its own with the recipe of `demo_run` and its data."""
    monkeypatch.chdir(tmp_path)
    write_demo()
    return tmp_path


@pytest.fixture
def trained(demo, base_directory, taught_directory, model_config) -> Recipe:
    """A finished run of the tiny models: the base is untaught, the SFT model is taught, and PPO has an adapter."""
    recipe = recipe_with("model={from_scratch: {hidden_size: 32, vocab_size: 320}, lora_r: 4}")
    for stage, model in (("base", base_directory), ("sft", taught_directory)):
        shutil.copytree(model, RunDirectory.of(recipe).path / stage)
    model = load_model(RUN / "sft", model_config)
    policy = get_peft_model(model, adapter_config(model, lora_config(model_config)))
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy.save_pretrained(RUN / "ppo")
    for stage in ("sft", "ppo"):  # not `complete`, which would set aside what is there
        (RUN / stage / "stage.json").write_text("{}")
    RunDirectory.of(recipe).save_recipe(recipe)
    return recipe
