"""What makes two runs of PPO the same experiment: settings, rewards and prompts, noted with the checkpoints."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, MethodType

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel

from pipeline.rewards import Reward
from pipeline.runtime.distributed import on_main
from pipeline.runtime.files import write_atomically
from pipeline.runtime.user_code import is_library_file
from pipeline.trainers.ppo.config import PPOConfig

EXPERIMENT_FILE = "experiment.json"
MAX_SHOWN = 100  # characters of a value; longer ones are compared by their digest


@dataclass(frozen=True)
class Experiment:
    """Settings by name, and for each reward weight, scaling and a digest of its code (None for Relay's own)."""

    settings: dict[str, object] = field(default_factory=dict)
    rewards: dict[str, dict[str, object]] = field(default_factory=dict)


def describe_experiment(
    model: PreTrainedModel,
    args: PPOConfig,
    rewards: Sequence[Reward],
    dataset: Dataset,
    peft_config: LoraConfig | None,
    seed: int,
) -> Experiment:
    """Describe a run as plain values, as they are read back from a file.

    Values that a reward function reads from outside of it, such as a keyword list, count as settings.
    """
    settings = {**asdict(args), "seed": seed, "model": model.config.name_or_path}
    settings["prompts"] = _digest(json.dumps(list(dataset["prompt"])))
    if peft_config is not None and args.use_peft:
        settings |= {"lora_r": peft_config.r, "lora_alpha": peft_config.lora_alpha}
    described = {}
    for reward in rewards:
        code = _FunctionCode()
        code.add(reward.function, reward.name)
        digest = _digest("\n".join(code.sources)) if code.sources else None
        described[reward.name] = {
            "weight": reward.weight_schedule or reward.weight,
            "score_scaling": reward.score_scaling,
            "code": digest,
        }
        settings |= code.values
    return Experiment(**json.loads(json.dumps({"settings": settings, "rewards": described})))


def check_experiment(directory: Path, experiment: Experiment, settings_too: bool) -> None:
    """Refuse to go on from the checkpoints of another experiment; every process calls it.

    Raises:
        ValueError: other rewards, or with `settings_too` other settings, each with what was and what is; or nothing
            says with which settings the checkpoints were made.
    """
    before = on_main(lambda: _read(directory / EXPERIMENT_FILE))
    if before is None:
        differences, others = ["which does not say its settings"] if settings_too else [], ""
    else:
        differences = _reward_differences(before.rewards, experiment.rewards)
        others = "" if differences else "train(resume_from_checkpoint=True) to go on from them all the same, "
        if settings_too:
            differences += _setting_differences(before.settings, experiment.settings)
    if differences:
        raise ValueError(
            f"{directory} holds the checkpoints of another experiment ({'; '.join(differences)}): give another "
            f"output_dir, {others}or train(resume_from_checkpoint=False) to remove them and start anew"
        )


def record_experiment(directory: Path, experiment: Experiment) -> None:
    """Write what the checkpoints from now on belong to; every process calls it, the main one writes."""

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / EXPERIMENT_FILE, json.dumps(asdict(experiment), indent=2) + "\n")

    on_main(write)


def _read(file: Path) -> Experiment | None:
    try:
        return Experiment(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _reward_differences(before: dict, after: dict) -> list[str]:
    if before.keys() != after.keys():
        return [f"its rewards are {', '.join(before)}, and now {', '.join(after)}"]
    lines = []
    for name, old in before.items():
        new = after[name]
        for key in ("weight", "score_scaling"):
            if old.get(key, new[key]) != new[key]:
                lines.append(f"the {key} of reward {name!r}: {old[key]} -> {new[key]}")
        if old["code"] != new["code"]:
            lines.append(f"the code of reward {name!r} has changed")
    return lines


def _setting_differences(before: dict, after: dict) -> list[str]:
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class _FunctionCode:
    """The source of a function and of the user's functions that it calls, and the plain values that they read."""

    sources: list[str] = field(default_factory=list)
    values: dict[str, object] = field(default_factory=dict)
    seen: list[object] = field(default_factory=list)

    def add(self, thing: Callable, label: str) -> None:
        """Add a function, class or callable object, under the name that its values get."""
        if any(thing is other for other in self.seen):
            return
        self.seen.append(thing)
        if isinstance(thing, functools.partial):
            self.add(thing.func, label)
            self._read_values({**{str(i): value for i, value in enumerate(thing.args)}, **thing.keywords}, label)
        elif isinstance(thing, MethodType):
            self.add(thing.__self__, label)
            self.add(thing.__func__, label)
        elif isinstance(thing, FunctionType):
            self._add_function(thing, label)
        elif isinstance(thing, type):
            self._add_class(thing)
        else:
            self._add_class(type(thing))
            self._read_values(_attributes(thing), label)

    def _add_function(self, function: FunctionType, label: str) -> None:
        if is_library_file(Path(function.__code__.co_filename)):
            return
        try:
            self.sources.append(inspect.getsource(function))
        except (OSError, TypeError):  # made without a file, as by exec
            self.sources.append(_bytecode(function))
        self._read_values(_outer_variables(function), label)

    def _add_class(self, cls: type) -> None:
        try:
            if not is_library_file(Path(inspect.getfile(cls))):
                self.sources.append(inspect.getsource(cls))
        except (OSError, TypeError):  # as above, or a class of Python itself
            self.sources.append(f"{cls.__module__}.{cls.__qualname__}")

    def _read_values(self, variables: dict[str, object], label: str) -> None:
        for name, value in variables.items():
            if isinstance(value, FunctionType | type | functools.partial):
                self.add(value, label)
                continue
            try:
                text = json.dumps(value, sort_keys=True)
            except (TypeError, ValueError):  # no plain value: a model, a module
                continue
            self.values[f"{label}.{name}"] = value if len(text) <= MAX_SHOWN else _digest(text)


def _bytecode(function: FunctionType) -> str:
    code = function.__code__
    constants = [value for value in code.co_consts if isinstance(value, str | int | float)]
    return repr((code.co_code, code.co_names, constants))


def _outer_variables(function: FunctionType) -> dict[str, object]:
    """Return the variables outside of a function that it reads, those of its inner functions and loops included."""
    names, codes = set(), [function.__code__]
    for code in codes:
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    variables = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable without a value yet
            variables[name] = cell.cell_contents
    return variables


def _attributes(thing: object) -> dict[str, object]:
    try:
        return vars(thing)
    except TypeError:  # an object with slots
        return {}


def with_settings(groups: Sequence[dict], scheduler: dict, args: PPOConfig) -> tuple[list[dict], dict]:
    """Return what was saved of an optimizer's groups and its schedule with the rates and settings of this run."""
    rates = (args.policy_learning_rate, args.value_function_learning_rate)
    settings = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    changed = []
    for group, rate in zip(groups, rates, strict=True):
        now = group["lr"] if rate == group["initial_lr"] else group["lr"] * rate / group["initial_lr"]
        changed.append({**group, **settings, "lr": now, "initial_lr": rate})
    return changed, {**scheduler, "base_lrs": list(rates)}
