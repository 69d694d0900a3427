"""The same files and models under other paths, and settings without effect: they make no stage out of date."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.stages.code_inputs import LIBRARY

# Sections whose data are read from files alone, as they name them, by the keys of these files.
DATA = {"task": ("path", "source", "target"), "reward.pairs": ("path",)}
TASKS = ("parallel", "columns")  # a user's task may read more than it names
MODEL = re.compile(r"model\.model_name_or_path|ppo\.(sft|reward)_model_path|reward\.model|eval\.systems\.\d+\.path")
CODE = re.compile(r"task\.name|(task\.augment|ppo\.rewards|eval\.metrics)\.\d+\.name|reward\.pairs\.metric")
TRAINERS = ("sft", "reward", "ppo")
# Keys of the trainers that change no weight: what is shown and logged, and who reads the rows ahead.
WITHOUT_EFFECT = ("report_to", "run_name", "disable_tqdm", "logging_steps", "dataloader_num_workers")


@dataclass(frozen=True)
class StageState:
    """What a stage depends on: its flat settings, the state of each input, and its data files in their order."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    files: list[str]

    def is_same(self, other: "StageState") -> bool:
        """Tell whether settings and inputs are equal, as JSON."""
        one, two = (json.dumps([s.settings, s.inputs], sort_keys=True) for s in (self, other))
        return one == two


def as_named_now(before: StageState, now: StageState, is_finished: bool) -> tuple[StageState, StageState]:
    """Return both states without the differences that change no result of a stage.

    `before` gets the paths of `now` where the same is behind them: a data file by its place in the order and by its
    name below the folder that the recipe gives, a model by its state, and a file of code by its name. The last two
    hold for a finished stage: checkpoints of an unfinished one name them.
    """
    before, now = _without_effectless(before), _without_effectless(now)
    before = _with_data_of(before, now)
    return (_with_code_of(_with_models_of(before, now), now) if is_finished else before), now


def _without_effectless(state: StageState) -> StageState:
    settings = state.settings
    removed = {f"{section}.{key}" for section in TRAINERS for key in WITHOUT_EFFECT}
    for section in TRAINERS:  # as in transformers, which then evaluates as often as it logs
        if settings.get(f"{section}.eval_strategy") == "steps" and not settings.get(f"{section}.eval_steps"):
            removed.discard(f"{section}.logging_steps")
    return replace(state, settings={key: value for key, value in settings.items() if key not in removed})


def _with_data_of(before: StageState, now: StageState) -> StageState:
    """Replace the paths of data files and the settings that give them."""
    names = [state.settings.get("task.name") for state in (before, now)]
    sections = [s for s in DATA if s != "task" or (names[0] in TASKS and names[0] == names[1])]
    starts = [{s: _starts(state.settings, s) for s in sections} for state in (before, now)]
    named = [_names(state.files, each) for state, each in zip((before, now), starts, strict=True)]
    moved = dict(zip(before.files, now.files, strict=False))
    if named[0] != named[1] or len(set(moved.values())) < len(moved):
        return before
    settings = dict(before.settings)
    for section in sections:
        is_read = all(_are_read(state.files, each, section) for state, each in zip((before, now), starts, strict=True))
        # Of the stages after the reward stage its record says which pairs it had.
        if is_read or (section != "task" and all("reward" in state.inputs for state in (before, now))):
            settings = _take_over(settings, now.settings, [f"{section}.{key}" for key in ("data_dir", *DATA[section])])
    return replace(before, settings=settings, inputs={moved.get(k, k): v for k, v in before.inputs.items()})


def _starts(settings: Mapping[str, Any], section: str) -> list[str]:
    """Return how the paths of a section's files begin: up to `{split}`, or whole."""
    folder = Path(settings.get(f"{section}.data_dir") or ".").expanduser()
    texts = [settings.get(f"{section}.{key}") for key in DATA[section]]
    paths = [str(folder / Path(text.partition("{")[0]).expanduser()) for text in texts if isinstance(text, str)]
    return ["" if path == "." else path for path in paths]


def _names(files: Sequence[str], starts: Mapping[str, Sequence[str]]) -> list[str]:
    """Return each file's name after the start that fits it best, or its suffix; its path where none fits."""
    names = []
    for file in files:
        start = _best_start(file, starts)
        names.append(file if start is None else file[len(start) :].lstrip("/") or Path(file).suffix)
    return names


def _best_start(file: str, starts: Mapping[str, Sequence[str]]) -> str | None:
    return max((s for each in starts.values() for s in each if file.startswith(s)), key=len, default=None)


def _are_read(files: Sequence[str], starts: Mapping[str, Sequence[str]], section: str) -> bool:
    """Tell whether there is a file behind each path of a section; a data set on the Hub has none."""
    return bool(starts[section]) and set(starts[section]) <= {_best_start(file, starts) for file in files}


def _with_models_of(before: StageState, now: StageState) -> StageState:
    """Replace the paths of models whose state is the same."""
    keys, old_names, same = [], set(), {}
    for key in filter(MODEL.fullmatch, before.settings):
        paths = [state.settings.get(key) for state in (before, now)]
        if not all(isinstance(path, str) for path in paths):
            continue
        old, new = (str(Path(path).expanduser()) for path in paths)
        if old in before.inputs and before.inputs[old] == now.inputs.get(new):
            keys.append(key)
            old_names.add(old)
            same[new] = before.inputs[old]
    inputs = {k: v for k, v in before.inputs.items() if k not in old_names or k in now.inputs} | same
    return replace(before, settings=_take_over(before.settings, now.settings, keys), inputs=inputs)


def _with_code_of(before: StageState, now: StageState) -> StageState:
    """Replace the folders of files of code; what is in the files is compared with the inputs."""
    keys = []
    for key in filter(CODE.fullmatch, before.settings):
        names = [_code_name(state.settings.get(key), state.inputs) for state in (before, now)]
        keys += [key] if names[0] is not None and names[0] == names[1] else []
    return replace(before, settings=_take_over(before.settings, now.settings, keys))


def _code_name(name: object, inputs: Mapping[str, str]) -> str | None:
    """Return `file.py:thing` or `evaluate:metric` without the folder; None for a name that is no file's."""
    is_library = isinstance(name, str) and name.startswith(LIBRARY)
    source, colon, thing = str(name).removeprefix(LIBRARY).partition(":")
    file = Path(source).name.removesuffix(".py")
    is_file = (is_library or source.endswith(".py")) and f"{file}.py" in inputs
    return f"{LIBRARY if is_library else ''}{file}{colon}{thing}" if is_file else None


def _take_over(settings: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return settings in which some keys are as they are now; one that is not set now is not set."""
    kept = {key: value for key, value in settings.items() if key not in keys}
    return kept | {key: now[key] for key in keys if key in now}
