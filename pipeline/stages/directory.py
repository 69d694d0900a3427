"""The directory of a run: its paths, the resolved recipe, the record of each stage, and stages that are set aside."""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.evaluation.config import BASELINES, CONTROL, SFT_BY_METRIC, SFT_LONGER
from pipeline.recipe import Recipe, recipe_values
from pipeline.runtime.files import write_atomically

STAGES = ("sft", "reward", "ppo", CONTROL, *BASELINES, "eval")
# Of the stages that are another run of a stage's script: that stage.
SCRIPT_OF = {CONTROL: "ppo", SFT_BY_METRIC: "sft", SFT_LONGER: "sft"}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sacrebleu", "trl-relay")
STARTED, FINISHED = "started.json", "stage.json"


@dataclass(frozen=True)
class RunDirectory:
    """`runs/<name>`: where everything of one run is."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> "RunDirectory":
        """Return the directory of a recipe's run, which need not exist yet."""
        return cls(Path(recipe.output_dir).expanduser() / recipe.name)

    @property
    def base(self) -> Path:
        """The from-scratch model the sft stage starts from."""
        return self.path / "base"

    @property
    def sft(self) -> Path:
        """The merged model of the sft stage."""
        return self.path / "sft"

    @property
    def reward(self) -> Path:
        """The reward model."""
        return self.path / "reward"

    @property
    def ppo(self) -> Path:
        """The adapter and value head of the ppo stage."""
        return self.path / "ppo"

    @property
    def control(self) -> Path:
        """The adapter of the control: PPO with shuffled scores."""
        return self.path / "control"

    @property
    def eval(self) -> Path:
        """The report of the eval stage."""
        return self.path / "eval"

    def stage(self, stage: str) -> Path:
        """Return the directory of a stage by name."""
        return self.path / stage

    def record_file(self, stage: str) -> Path | None:
        """Return the record of a stage: stage.json of a finished one, else started.json, or None without either."""
        files = (self.stage(stage) / name for name in (FINISHED, STARTED))
        return next((file for file in files if file.exists()), None)

    def find_model(self, path: str, recipe: Recipe) -> str:
        """Return the path of a model; one that is not here is looked for in the folder that the run was made in."""
        depth = len(Path(recipe.output_dir).parts)  # the run is below it, unless output_dir is absolute or was changed
        parents = self.path.resolve().parents
        if (
            Path(path).expanduser().exists()
            or Path(recipe.output_dir).expanduser().is_absolute()
            or depth >= len(parents)
        ):
            return path
        found = parents[depth] / path
        return str(found) if found.is_dir() else path

    def save_recipe(self, recipe: Recipe) -> Path:
        """Write `recipe.yaml`: `load_recipe` reads an equal recipe back; versions are comments at its top."""
        yaml, text = YAML(typ="safe", pure=True), StringIO()
        yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = False, False, 4096
        yaml.dump(recipe_values(recipe), text)
        lines = ["The recipe as resolved, with the versions it ran under.", *map(": ".join, versions().items())]
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "recipe.yaml"
        write_atomically(file, "".join(f"# {line}\n" for line in lines) + "\n" + text.getvalue())
        return file


def script_of(stage: str) -> str:
    """Return the name of the script that runs a stage, which is also the section of the recipe that it trains by."""
    return SCRIPT_OF.get(stage, stage)


def last_section(stage: str) -> str:
    """Return the section of the recipe up to which its sections decide the result of a stage."""
    return "ppo" if stage == SFT_BY_METRIC else script_of(stage)  # which chooses by PPO's rule


def stage_option(stage: str) -> list[str]:
    """Return the arguments by which a script runs another stage than that of its name."""
    return [] if script_of(stage) == stage else ["--stage", stage]


def versions() -> dict[str, str]:
    """Return the versions of Python and of each package a result depends on, where it is installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def read_record(file: Path | None) -> dict[str, Any]:
    """Read the JSON object of a record; an empty one where the file is missing or not whole."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    write_atomically(file, json.dumps(record, indent=2) + "\n")


def set_aside(directory: Path) -> Path:
    """Rename a stage's directory to `<stage>.outdated-1`, or the next number that is free; return the new path."""
    number = 1
    while (target := directory.with_name(f"{directory.name}.outdated-{number}")).exists():
        number += 1
    return directory.rename(target)
