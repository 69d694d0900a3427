"""README.md of the models of a run: written when a model is trained, and again with the figures of the evaluation."""

import dataclasses
import json
from pathlib import Path

from pipeline.evaluation.config import CONTROL
from pipeline.evaluation.pages.model_card import CardFacts, model_card
from pipeline.models.hub import ADAPTER_FILE
from pipeline.models.loading import language_model_class, load_config
from pipeline.recipe import Recipe
from pipeline.runtime.files import write_atomically
from pipeline.stages.directory import RunDirectory, versions
from pipeline.stages.inputs import sft_model_path

MODEL_FILES = (ADAPTER_FILE, "config.json")
DATA_KEYS = ("path", "data_dir", "source", "target")  # of a task's settings, where they say which files it reads


def write_model_cards(recipe: Recipe, run: RunDirectory, stage: str) -> None:
    """Write the card of the model that a stage has trained, or those of all models once they are evaluated.

    A model that was made elsewhere keeps its own, and so does one that this recipe no longer makes.
    """
    file, report = run.eval / "report.json", None
    if stage == "eval":
        if not file.is_file():
            return
        report = json.loads(file.read_text(encoding="utf-8"))
    makes = {"sft": not recipe.sft_is_external, "ppo": recipe.ppo is not None, CONTROL: recipe.control}
    for name in makes:
        is_model = any((run.stage(name) / model_file).is_file() for model_file in MODEL_FILES)
        if is_model and (stage == name or (stage == "eval" and makes[name])):
            write_atomically(run.stage(name) / "README.md", model_card(card_facts(recipe, run, name), report))


def card_facts(recipe: Recipe, run: RunDirectory, stage: str) -> CardFacts:
    """Collect what a card says of a model of this run without any figures."""
    config, task = recipe.model, dataclasses.asdict(recipe.task.config)
    directory, sft, by_ppo = run.stage(stage), sft_model_path(recipe, run), stage != "sft"
    base = sft if by_ppo and recipe.sft_is_external else config.model_name_or_path
    on_hub = base is not None and not Path(base).expanduser().exists()
    described = {key: str(task[key]) for key in DATA_KEYS if task.get(key)}
    folders = [name for name in Path(described.get("path") or described.get("data_dir", "")).parts if "{" not in name]
    return CardFacts(
        name=recipe.name,
        stage=stage,
        seed=recipe.seed,
        base=f"random weights ({config.from_scratch.architecture})" if base is None else str(base),
        start=str(base) if recipe.sft_is_external else "the SFT model of the same run",
        hub_base=str(base) if on_hub else None,
        data=", ".join([recipe.task.name, *(f"{key} {value}" for key, value in described.items())]),
        data_name=folders[-1] if folders else recipe.name,
        language=recipe.language,
        rewards=[f"{reward.name} x {reward.last_weight:g}" for reward in recipe.ppo.rewards] if by_ppo else [],
        is_adapter=(directory / ADAPTER_FILE).is_file(),
        auto_class=language_model_class(load_config(sft, config)).__name__,
        path=str(directory),
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
        versions=versions(),
    )
