"""What a run leaves on disk: the resolved recipe, a directory per stage, and the settings each stage was made with."""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from pipeline.evaluation.config import AUTO
from pipeline.recipe import Recipe, recipe_values
from pipeline.tasks import preferences, task_module

STAGES = ("sft", "reward", "ppo", "eval")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sacrebleu", "trl-relay")
STARTED, FINISHED = "started.json", "stage.json"
ABSENT = "absent"
STATE = ("fingerprint", "settings", "inputs")  # what both record

Status = Literal["complete", "partial", "changed", "absent"]


@dataclass(frozen=True)
class RunDirectory:
    """`runs/<name>`: where everything of one run is."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> "RunDirectory":
        """The directory of a recipe's run, which need not exist yet."""
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
    def eval(self) -> Path:
        """The report of the eval stage."""
        return self.path / "eval"

    def stage(self, stage: str) -> Path:
        """The directory of a stage by name."""
        return self.path / stage

    def save_recipe(self, recipe: Recipe) -> Path:
        """Write `recipe.yaml`: `load_recipe` reads an equal recipe back; versions are comments above it."""
        yaml, text = YAML(typ="safe", pure=True), StringIO()
        yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = False, False, 4096
        yaml.dump(recipe_values(recipe), text)
        lines = ["The recipe as resolved, with the versions it ran under.", *map(": ".join, versions().items())]
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "recipe.yaml"
        _write(file, "".join(f"# {line}\n" for line in lines) + "\n" + text.getvalue())
        return file


def versions() -> dict[str, str]:
    """The versions of Python and of each package a result depends on, where it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What the result of a stage depends on, flat: `{"model.lora_r": 16, ...}`; the run's name and place do not count.

    What comes after sft depends on it too, unless `ppo.sft_model_path` names another model; ppo depends on a reward
    stage that pays it, and eval on everything before it. `reward.min_accuracy` changes no result.
    """
    sections = ["seed", "model", "task", "sft", "reward", "ppo", "eval"][: 4 + STAGES.index(stage)]
    values = recipe_values(recipe)
    if recipe.sft_is_external and stage != "sft":
        sections.remove("sft")
    if stage not in ("sft", "reward") and not recipe.uses_own_reward:
        sections.remove("reward")
    flat = _flat({section: values[section] for section in sections if section in values})
    flat.pop("reward.min_accuracy", None)
    return flat


def stage_inputs(recipe: Recipe, stage: str) -> dict[str, str]:
    """The state of everything on disk that a stage reads, by path, or by name for the stages before it.

    An earlier stage counts as it was made, not by its settings: made again, it gives other weights.
    """
    inputs = {str(p): _digest_file(p) for p in task_module(recipe.task.name).files(recipe.task.config)}
    models = [recipe.model.model_name_or_path]
    if recipe.sft_is_external and stage != "sft":
        models.append(recipe.ppo.sft_model_path)
    if stage == "reward":
        inputs |= {str(p): _digest_file(p) for p in pair_files(recipe)}
        models.append(recipe.reward.model if recipe.reward else None)
    if stage in ("ppo", "eval") and recipe.reward_is_external:
        models.append(recipe.ppo.reward_model_path)
    local = [Path(model).expanduser() for model in models if model is not None]
    inputs |= {str(p): _digest_model(p) for p in local if p.is_dir()}
    directory = RunDirectory.of(recipe)
    if stage == "eval":
        places = [Path(system.path).expanduser() for system in recipe.eval.further_systems]
        inputs |= {str(p): _digest_model(p) for p in places if p.is_dir()}
        control = control_run(recipe)
        if control is not None:
            record = control / "ppo" / FINISHED
            inputs["control"] = _digest_file(record) if record.is_file() else ABSENT
    records = {name: directory.stage(name) / FINISHED for name in needed_stages(recipe, stage)}
    return inputs | {name: _digest_file(record) if record.is_file() else ABSENT for name, record in records.items()}


def pair_files(recipe: Recipe) -> list[Path]:
    """The local files that the pairs of the reward stage are read from.

    Raises:
        TaskError: one that is not there.
    """
    own = recipe.reward is not None and isinstance(recipe.reward.pairs, preferences.Config)
    return preferences.files(recipe.reward.pairs) if own else []


def needed_stages(recipe: Recipe, stage: str) -> list[str]:
    """The stages of this run whose results a stage reads."""
    needed = [] if stage == "sft" or recipe.sft_is_external else ["sft"]
    if stage in ("ppo", "eval") and recipe.uses_own_reward:
        needed.append("reward")
    return [*needed, "ppo"] if stage == "eval" and "ppo" in recipe.eval.systems else needed


def control_run(recipe: Recipe) -> Path | None:
    """The run directory of the constant-reward control that the report shows: `eval.control`, or one beside this run.

    One that is found by itself has paid only `constant` from this recipe's SFT model as it is now; of several, one
    with the same seed, else the one that finished last.
    """
    chosen = recipe.eval.control
    if chosen is None or recipe.ppo is None or "ppo" not in recipe.eval.systems:
        return None
    if chosen != AUTO:
        return Path(chosen).expanduser()
    own, records = RunDirectory.of(recipe).path, {}
    for file in sorted(own.parent.glob(f"*/ppo/{FINISHED}")):
        settings = _read_json(file).get("settings", {})
        paid = [value for key, value in settings.items() if re.fullmatch(r"ppo\.rewards\.\d+\.name", key)]
        run = file.parent.parent
        if run != own and set(paid) == {"constant"} and _control_problem(recipe, run) is None:
            records[run] = (settings.get("seed") == recipe.seed, str(_read_json(file).get("finished_at")))
    return max(records, key=records.get, default=None)


def _control_problem(recipe: Recipe, run: Path) -> str | None:
    """Why a run is no control of this recipe; None if it is one."""
    record = _read_json(run / "ppo" / FINISHED)
    if not record:
        return "is no run directory with a finished ppo stage; run the control first, or set eval.control=null"
    sft = RunDirectory.of(recipe).sft if recipe.ppo.sft_model_path is None else Path(recipe.ppo.sft_model_path)
    started = record.get("settings", {}).get("ppo.sft_model_path") or str(run / "sft")
    same = Path(started).expanduser().resolve() == sft.expanduser().resolve()
    recorded = record.get("inputs", {}).get(str(Path(started).expanduser()))
    here = sft.expanduser().is_dir()
    if not same or (here and recorded is not None and recorded != _digest_model(sft.expanduser())):
        return f"did not start from the SFT model {str(sft)!r} as it is now; run it with ppo.sft_model_path={sft}"
    return None


def stage_fingerprint(recipe: Recipe, stage: str) -> str:
    """A SHA-256 over everything the result of a stage depends on: equal if and only if nothing of it changed."""
    content = [stage, stage_settings(recipe, stage), stage_inputs(recipe, stage)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists that hold some, as one mapping with dotted keys."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: str(value) if isinstance(value, float) and math.isinf(value) else value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def _digest_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest_model(directory: Path) -> str:
    """The record of the stage that made a model; without one, the sizes and times of the files."""
    if (directory / FINISHED).is_file():
        return _digest_file(directory / FINISHED)
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(directory.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def begin_stage(directory: RunDirectory, recipe: Recipe, stage: str) -> Path | None:
    """Make a stage's directory ready and write `recipe.yaml` and the stage's `started.json`; one process calls it.

    An interrupted stage with the same settings is left as it is, to be resumed. Anything else that is there is set
    aside, never overwritten; returns where it went.
    """
    status = stage_status(directory, recipe, stage)
    moved = set_aside(directory.stage(stage)) if status in ("changed", "complete") else None
    directory.save_recipe(recipe)
    directory.stage(stage).mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "started_at": time.time(), **_state(recipe, stage)}
    _write(directory.stage(stage) / STARTED, json.dumps(record, indent=2) + "\n")
    return moved


def finish_stage(directory: RunDirectory, recipe: Recipe, stage: str, **summary: Any) -> Path:
    """Write `stage.json`, the last file of a stage: only a stage that has it is complete; one process calls it.

    The fingerprint is that of `begin_stage`, whatever was edited since. `seconds` are those since then unless the
    summary has its own.
    """
    started = _read_json(directory.stage(stage) / STARTED)
    record = {
        "seconds": round(time.time() - started.get("started_at", time.time()), 3),
        **summary,
        "stage": stage,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        **({key: started[key] for key in STATE} if "fingerprint" in started else _state(recipe, stage)),
    }
    file = directory.stage(stage) / FINISHED
    _write(file, json.dumps(record, indent=2) + "\n")
    return file


def _state(recipe: Recipe, stage: str) -> dict[str, Any]:
    values = (stage_fingerprint(recipe, stage), stage_settings(recipe, stage), stage_inputs(recipe, stage))
    return dict(zip(STATE, values, strict=True))


def _write(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is missing or not whole."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def stage_status(directory: RunDirectory, recipe: Recipe, stage: str) -> Status:
    """Whether a stage is done with these settings, was interrupted, was made with other settings, or is not there."""
    for name, status in ((FINISHED, "complete"), (STARTED, "partial")):
        file = directory.stage(stage) / name
        if file.exists():
            same = _read_json(file).get("fingerprint") == stage_fingerprint(recipe, stage)
            return status if same else "changed"
    return "absent"


def setting_differences(directory: RunDirectory, recipe: Recipe, stage: str) -> list[str]:
    """What differs between the settings a stage was made with and the recipe's: `ppo.kl_coef: 0.05 -> 0.1`."""
    files = [directory.stage(stage) / name for name in (FINISHED, STARTED)]
    old = next((_read_json(file) for file in files if file.exists()), {})
    if "settings" not in old:
        return ["its record cannot be read"]
    before, after = old["settings"], stage_settings(recipe, stage)
    lines = [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in dict.fromkeys([*after, *before])
        if _shown(before, key) != _shown(after, key)
    ]
    old_inputs, new_inputs = old.get("inputs", {}), stage_inputs(recipe, stage)
    for path, state in new_inputs.items():
        if "inputs" in old and path not in old_inputs:
            lines.append(f"{path}: not there before")
        if path in old_inputs and old_inputs[path] != state:
            change = (
                "its contents changed" if path not in STAGES else "not finished" if state == ABSENT else "made again"
            )
            lines.append(f"{path}: {change}")
    return lines


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "(not set)"


def set_aside(directory: Path) -> Path:
    """Rename a stage's directory to `<stage>.outdated-1`, or the next number that is free."""
    number = 1
    while (target := directory.with_name(f"{directory.name}.outdated-{number}")).exists():
        number += 1
    return directory.rename(target)


def stage_command(recipe: Recipe, stage: str) -> str:
    """The command that runs one stage of a recipe."""
    source = recipe.source
    arguments = (
        [str(RunDirectory.of(recipe).path / "recipe.yaml")] if source is None else [source.file, *source.overrides]
    )
    return shlex.join(["accelerate", "launch", f"pipeline/{stage}.py", *arguments])


def missing_input(recipe: Recipe, stage: str) -> str | None:
    """Why a stage cannot start yet, with the command that makes what it lacks; None if it can."""
    directory = RunDirectory.of(recipe)
    for name in needed_stages(recipe, stage):
        status, place = stage_status(directory, recipe, name), directory.stage(name)
        if status == "complete":
            continue
        problem = f"no finished {name} stage in {place}"
        if status == "changed":
            differences = setting_differences(directory, recipe, name)
            problem = f"the {name} stage in {place} was made with other settings ({'; '.join(differences[:3])})"
        return f"{stage}: {problem}; run: {stage_command(recipe, name)}"
    control = control_run(recipe) if stage == "eval" else None
    problem = _control_problem(recipe, control) if control is not None else None
    return f"eval: eval.control: {str(control)!r} {problem}" if problem else None
