"""A recipe over ten sentence pairs in the current directory, and records of its stages without a model."""

from pathlib import Path

from pipeline.recipe import Recipe, load_recipe
from pipeline.stages.directory import RunDirectory
from pipeline.stages.stage import begin_stage, finish_stage

OWN = ("sft", "ppo", "eval")  # the stages of a recipe without a reward section and controls
RECIPE = """\
name: demo
model: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400, max_position_embeddings: 64}}
task: {name: parallel, source: "{split}.en", target: "{split}.de"}
sft: {per_device_train_batch_size: 4, num_train_epochs: 2}
ppo: {rewards: [bleu], response_length: 8, per_device_train_batch_size: 2, total_episodes: 20, num_mini_batches: 2}
eval: {metrics: [bleu]}
"""
DATA_FILES = [f"{split}.{side}" for split in ("train", "validation", "test") for side in ("en", "de")]


def write_demo() -> None:
    """Write the recipe and its data."""
    Path("recipe.yaml").write_text(RECIPE)
    for name in DATA_FILES:
        Path(name).write_text("".join(f"{name[-2:]} {number}\n" for number in range(10)))


def recipe_with(*overrides: str) -> Recipe:
    """Load the recipe with overrides."""
    return load_recipe("recipe.yaml", overrides)


def complete(recipe: Recipe, *stages: str) -> None:
    """Begin and finish stages without running them."""
    for stage in stages:
        begin_stage(RunDirectory.of(recipe), recipe, stage)
        finish_stage(RunDirectory.of(recipe), recipe, stage)
