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
