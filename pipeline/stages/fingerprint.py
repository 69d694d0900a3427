"""What a stage depends on, and whether its result is complete, changed, partial or absent."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.evaluation.config import CONTROL, SFT_BY_METRIC, SFT_LONGER
from pipeline.recipe import Recipe, recipe_values
from pipeline.stages.code_inputs import choosing_metrics, code_files
from pipeline.stages.control import control_run, ppo_arguments
from pipeline.stages.digests import (
    Stamp,
    file_digest,
    file_stamp,
    files_state,
    model_state,
    record_digest,
    remember_digests,
)
from pipeline.stages.directory import FINISHED, STAGES, RunDirectory, last_section, read_record
from pipeline.stages.moved_inputs import StageState, as_named_now
from pipeline.tasks import preferences, speech, task_module

ABSENT = "absent"
STATE = ("fingerprint", "settings", "inputs", "stamps")  # what a stage records of what it depends on
SOUND = "the sound of task.audio"  # what the state of all sound files is called
# Keys of the section ppo by which best-of-n samples are written and scored.
SCORES_SAMPLES = ("rewards", "response_length", "min_new_tokens", "stop_strings", "suppress_tokens")
SCORES_SAMPLES += ("on_reward_error", "reward_timeout")
HUB_REVISION = "main"  # of a classifier, which `model.model_revision` is not about

Status = Literal["complete", "partial", "changed", "absent"]


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the settings that the result of a stage depends on, flat: `{"model.lora_r": 16, ...}`.

    The stages after sft depend on its settings too, unless `ppo.sft_model_path` names another model; ppo depends on a
    reward stage that rewards it, control and sft_by_metric on the same as ppo, and eval on everything before it. The
    name and place of the run and `reward.min_accuracy` change no result, and `task.cluster` and
    `task.max_test_examples` none but that of eval.
    """
    sections = ["seed", "model", "task", "sft", "reward", "ppo", "control", "eval"]
    sections = sections[: sections.index(last_section(stage)) + 1]
    if stage == CONTROL:
        recipe = replace(recipe, control=False, ppo=ppo_arguments(recipe, stage))
    values = recipe_values(recipe)
    if recipe.sft_is_external and stage != "sft":
        sections.remove("sft")
    if last_section(stage) in ("ppo", "eval") and not recipe.uses_own_reward:
        sections.remove("reward")
    flat = _flat({section: values[section] for section in sections if section in values})
    flat |= _flat(_settings_of_later_sections(recipe, stage, values))
    flat.pop("reward.min_accuracy", None)
    if stage != "eval":
        flat.pop("task.cluster", None)
        if "task.max_test_examples" in flat:  # null, as in runs from before it was left out
            flat["task.max_test_examples"] = None
    if not recipe.augment:  # runs from before there was that key are still the same
        flat.pop("task.augment", None)
    return flat


def _settings_of_later_sections(recipe: Recipe, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stage reads of sections that stand after its own: what scores its samples, or its checkpoints."""
    ppo, settings = recipe.ppo, {}
    if stage in ("sft", SFT_LONGER) and recipe.sft.best_of_n is not None:
        settings["ppo"] = {key: values["ppo"][key] for key in SCORES_SAMPLES}
    if stage == "reward" and recipe.reward is not None and recipe.reward.model is not None and ppo is not None:
        learned = ppo.learned_reward
        settings |= {"ppo": {"rewards": {"learned": dict(learned.options)}}} if learned and learned.options else {}
    if numbers := choosing_metrics(recipe, stage):
        settings["eval"] = {"metrics": [values["eval"]["metrics"][number] for number in numbers]}
    return settings


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists that hold some, as one mapping with dotted keys."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: str(value) if isinstance(value, float) and math.isinf(value) else value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def needed_stages(recipe: Recipe, stage: str) -> list[str]:
    """Return the stages of this run whose results a stage reads."""
    if stage == SFT_LONGER:
        return ["sft", "ppo"]  # their times
    reads_sft = recipe.evaluation_reads_sft if stage == "eval" else stage != "sft"
    needed = ["sft"] if reads_sft and not recipe.sft_is_external else []
    if last_section(stage) in ("ppo", "eval") and recipe.uses_own_reward:
        needed.append("reward")
    if stage == SFT_BY_METRIC and any(reward.score_scaling != "none" for reward in recipe.ppo.rewards):
        needed.append("ppo")  # its first rollout scales them
    if stage == "eval" and "ppo" in recipe.eval.systems:
        needed += ["ppo", *([CONTROL] if recipe.control else []), *recipe.eval.baselines]
    return needed


def data_files(recipe: Recipe, stage: str) -> list[Path]:
    """Return the local data files that a stage reads.

    Raises:
        TaskError: one that is not there.
    """
    files = task_module(recipe.task.name).files(recipe.task.config)
    if stage == "reward" and recipe.reward is not None and isinstance(recipe.reward.pairs, preferences.Config):
        files = [*files, *preferences.files(recipe.reward.pairs)]
    return files


def external_models(recipe: Recipe, stage: str) -> dict[str, str]:
    """Return the models from outside this run that a stage reads, a path or Hub id each, with their Hub revisions."""
    models = {recipe.model.model_name_or_path: recipe.model.model_revision}
    if recipe.sft_is_external and stage != "sft":
        models[recipe.ppo.sft_model_path] = recipe.model.revision_of(recipe.ppo.sft_model_path)
    if stage == "reward" and recipe.reward is not None:
        models[recipe.reward.model] = HUB_REVISION
    if last_section(stage) in ("ppo", "eval") and recipe.reward_is_external:
        models[recipe.ppo.reward_model_path] = HUB_REVISION
    if stage == "eval":
        models |= {system.path: recipe.model.revision_of(system.path) for system in recipe.eval.further_systems}
    return {path: revision for path, revision in models.items() if path is not None}


def stage_inputs(recipe: Recipe, stage: str, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the state of everything that a stage reads: by path, by Hub id, or by name for the stages before it.

    An earlier stage counts by its record, not by its settings: made again, it gives other weights. A Hub model of
    which nothing is in the local cache is as it is `recorded`. Nothing goes to the network.
    """
    files = {str(path): path for path in data_files(recipe, stage)} | code_files(recipe, stage)
    return (
        {name: file_digest(path) for name, path in files.items()}
        | _sound_state(recipe, recorded)
        | _model_states(recipe, stage, recorded or {})
        | _earlier_results(recipe, stage)
    )


def _sound_state(recipe: Recipe, recorded: Mapping[str, str] | None) -> dict[str, str]:
    """Return the state of the sound files that the rows name; left out where a record is older than this state."""
    config = recipe.task.config
    if not isinstance(config, speech.Config) or (recorded is not None and SOUND not in recorded):
        return {}
    files = _sound_files(config, tuple(map(file_stamp, speech.files(config))))
    return {SOUND: files_state(files)} if files else {}


@cache
def _sound_files(config: speech.Config, stamps: tuple[Stamp, ...]) -> list[Path]:
    """Return the sound files of a task; the rows are read again where the `stamps` of their files are others."""
    return speech.sound_files(config)


def _model_states(recipe: Recipe, stage: str, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the state of each model from outside this run; one that is neither here nor recorded is left out."""
    states: dict[str, str | None] = {}
    for path, revision in external_models(recipe, stage).items():
        directory = Path(path).expanduser()
        name = str(directory) if directory.is_dir() else path
        states[name] = model_state(path, revision) or recorded.get(name)
    return {name: state for name, state in states.items() if state is not None}


def _earlier_results(recipe: Recipe, stage: str) -> dict[str, str]:
    """Return the state of the stages of this run, and of the control, that a stage reads."""
    run, control = RunDirectory.of(recipe), control_run(recipe) if stage == "eval" else None
    directories = {} if control is None else {"control": control / "ppo"}
    directories |= {name: run.stage(name) for name in needed_stages(recipe, stage)}
    return {name: record_digest(directory) or ABSENT for name, directory in directories.items()}


def stage_fingerprint(recipe: Recipe, stage: str, recorded: Mapping[str, str] | None = None) -> str:
    """Return a SHA-256 over the settings and inputs of a stage; it differs if a setting, a model or a file changed.

    Two changes are not seen: a data set on the Hub counts by its name and `task.revision`, not by its rows; and a file
    of the same size and time of change counts as the same file. Of sound files nothing else counts.
    """
    content = [stage, stage_settings(recipe, stage), stage_inputs(recipe, stage, recorded)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stage_state(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return what a stage records of what it depends on; `stamps` are the sizes and times of its data files."""
    stamps = [file_stamp(path) for path in data_files(recipe, stage)]  # first: an edit from here on is noticed later
    values = (
        stage_fingerprint(recipe, stage),
        stage_settings(recipe, stage),
        stage_inputs(recipe, stage),
        stamps,
    )
    return dict(zip(STATE, values, strict=True))


def _recorded_state(run: RunDirectory, stage: str) -> dict[str, Any]:
    """Read the record of a stage; data files that have kept size and time since then need not be read again."""
    record = read_record(run.record_file(stage))
    remember_digests(map(tuple, record.get("stamps", ())), record.get("inputs", {}))
    return record


def stage_status(run: RunDirectory, recipe: Recipe, stage: str) -> Status:
    """Tell whether a stage is done with these settings, was interrupted, was made with others, or is not there.

    Where only paths differ, or settings without effect, it is as it was: see `as_named_now`.
    """
    file = run.record_file(stage)
    if file is None:
        return "absent"
    record = _recorded_state(run, stage)
    if record.get("fingerprint") != stage_fingerprint(recipe, stage, record.get("inputs")):
        before, now = _compared_states(run, recipe, stage, record)
        if before is None or not before.is_same(now):
            return "changed"
    return "complete" if file.name == FINISHED else "partial"


def _compared_states(
    run: RunDirectory, recipe: Recipe, stage: str, record: Mapping[str, Any]
) -> tuple[StageState | None, StageState]:
    """Return what a stage was made of, None where the record does not say it whole, and what it would be made of."""
    inputs, files = stage_inputs(recipe, stage, record.get("inputs")), data_files(recipe, stage)
    now = StageState(stage_settings(recipe, stage), inputs, list(map(str, files)))
    if any(key not in record for key in STATE):
        return None, now
    before = StageState(record["settings"], record["inputs"], [path for path, *_ in record["stamps"]])
    return as_named_now(before, now, run.record_file(stage).name == FINISHED)


def setting_differences(run: RunDirectory, recipe: Recipe, stage: str) -> list[str]:
    """List what differs between the record of a stage and the recipe: `ppo.kl_coef: 0.05 -> 0.1`."""
    record = _recorded_state(run, stage)
    if "settings" not in record:
        return ["its record cannot be read"]
    compared, now = _compared_states(run, recipe, stage, record)
    before = compared or StageState(record["settings"], record.get("inputs", now.inputs), [])
    keys = [k for k in dict.fromkeys([*now.settings, *before.settings]) if _shown(before, k) != _shown(now, k)]
    lines = [f"{key}: {_shown(before, key)} -> {_shown(now, key)}" for key in keys]
    return [*lines, *_input_differences(before.inputs, now.inputs)]


def _shown(state: StageState, key: str) -> str:
    return json.dumps(state.settings[key], ensure_ascii=False) if key in state.settings else "(not set)"


def _input_differences(before: Mapping[str, str], after: Mapping[str, str]) -> Sequence[str]:
    lines = []
    for name, state in after.items():
        if name not in before:
            lines.append(f"{name}: not there before")
        elif before[name] != state:
            change = "its contents changed"
            if name in STAGES:
                change = "not finished" if state == ABSENT else "made again"
            lines.append(f"{name}: {change}")
    stages = set(STAGES) - {CONTROL}  # a setting says why they are not; a control may be another run's
    lines += [f"{name}: no longer read" for name in before if name not in (*after, *stages)]
    return lines
