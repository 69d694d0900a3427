"""Every recipe in recipes/ is read, and those about columns fit the data they describe."""

import json
from pathlib import Path

import pytest

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
