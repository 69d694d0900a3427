"""Every recipe in recipes/ is read, and those about columns fit the data they describe."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import run
from pipeline.recipe import load_recipe
from pipeline.tasks import SPLITS, load_task

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
ROWS = {
    "scitldr": {"abstract": "We study cats.", "summaries": ["Cats, studied.", "On cats."], "title": "Cats"},
    "xquad": {"context": "The cat sat on the mat.", "question": "Who sat?", "answers": ["The cat", "the cat"]},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_named_like_its_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem


# Of recipes with recorded results: what PPO trained with, whatever the defaults are today.
RECORDED = {
    "quickstart": (5e-4, 5e-4, 0.1, 0.01, 32),
    "quickstart_t5": (1.5e-3, 1.5e-3, 0.1, 0.01, 32),
    "quickstart_reward_model": (5e-4, 5e-4, 0.1, 0.1, 32),
    "multi30k_en_de": (2e-3, None, 0.0, 0.01, 48),
    "multi30k_encoder_decoder": (2e-3, None, 0.0, 0.01, 48),
}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in RECORDED], ids=lambda path: path.stem)
def test_a_recorded_recipe_does_not_follow_new_defaults(path):
    recipe, (rate, value_rate, vf_coef, kl_coef, length) = load_recipe(path), RECORDED[path.stem]
    ppo = recipe.ppo
    assert (ppo.policy_learning_rate, ppo.value_loss_weight, ppo.kl_coef) == (rate, vf_coef, kl_coef)
    assert value_rate in (None, ppo.value_function_learning_rate)
    assert (ppo.num_ppo_epochs, ppo.lam, ppo.adam_epsilon, ppo.response_length) == (2, 1.0, 1e-5, length)
    assert (ppo.score_scaling, ppo.dual_clip, ppo.missing_eos_penalty, ppo.score_clip) == ("none", None, None, None)
    assert recipe.model.dtype == "float32"


@pytest.mark.parametrize("name", ROWS)
def test_a_columns_recipe_fits_its_data(name, tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    path = next(path for path in RECIPES if path.stem == name)
    recipe = load_recipe(path, [f"task.data_dir={tmp_path}"])
    example = load_task(recipe.task.name, recipe.task.config).train[0]
    references = ROWS[name].get("summaries") or ROWS[name]["answers"]
    assert example["references"] == references and example["completion"] == references[0]
    assert example["prompt"].endswith(":\n") and "{" not in example["prompt"]
    assert all(
        str(value) in example["prompt"] for key, value in ROWS[name].items() if key in recipe.task.config.prompt
    )


def test_the_dialogue_recipe_is_planned_with_a_chat_model(taught_directory, tokenizer, tmp_path, capsys):
    model = shutil.copytree(taught_directory, tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(model)
    row = {"messages": [{"role": "user", "content": "say north"}], "responses": ["red", "blue two one"]}
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    path = next(path for path in RECIPES if path.stem == "smollm2_dialogue")
    places = {"model.model_name_or_path": model, "ppo.sft_model_path": model, "task.data_dir": tmp_path}
    overrides = [f"{key}={value}" for key, value in {**places, "output_dir": tmp_path / "runs"}.items()]
    assert run.main([str(path), *overrides, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate 3e-05 (LoRA)" in shown and "response_length 8, by the length of the references" in shown


@pytest.mark.parametrize("name", ["quickstart", "quickstart_t5", "quickstart_reward_model"])
def test_a_quickstart_finds_its_sentences_from_any_folder(name, tmp_path, monkeypatch):
    path = next(path for path in RECIPES if path.stem == name)
    monkeypatch.chdir(path.parent.parent)
    beside = load_recipe(path, ["task.max_train_examples=3"])
    assert beside == load_recipe(f"recipes/{name}.yaml", ["task.max_train_examples=3"])  # the same files to a stage
    assert beside.task.config.data_dir == "recipes/phrasebook"
    monkeypatch.chdir(tmp_path)
    away = load_recipe(path, ["task.max_train_examples=3"])
    assert away.task.config.data_dir == str(path.parent / "phrasebook")
    task = load_task(away.task.name, away.task.config)
    assert task.train["source"][0] == "At midday the lazy singer bought a key in an old bakery."
    pairs = load_recipe(path, ["reward={pairs: {path: a.jsonl, data_dir: '{recipe_dir}/x'}}"]).reward.pairs
    assert pairs.data_dir == str(path.parent / "x")
    assert (len(task.train), len(task.validation), len(task.test), task.language) == (3, 256, 2000, "de")
