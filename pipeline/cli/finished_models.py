"""Where the models of a finished run are, and what they read of a text that a user types."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from pipeline.evaluation.systems import Answering, Source
from pipeline.models.config import ModelConfig
from pipeline.models.hub import CONFIG_FILES
from pipeline.models.sampling import Decoding
from pipeline.recipe import Recipe, load_stored_recipe
from pipeline.stages.digests import record_digest
from pipeline.stages.directory import FINISHED, RunDirectory, read_record
from pipeline.stages.inputs import sft_model_path
from pipeline.stages.task import base_model_path, task_config
from pipeline.tasks import parallel
from pipeline.tasks.chats import Message, as_user_turn, with_system

SYSTEMS = ("base", "sft", "ppo")
TRAINED = ("sft", "ppo")
FAILURES = (ValueError, OSError, FloatingPointError, SafetensorError)  # the last where weights find a full disk
NEW_TOKENS = 128  # of a model without a recipe
FOLDER_STATE = 64  # characters of a folder's state in a record; a commit of the Hub has 40


@dataclass(frozen=True)
class FinishedModel:
    """A model that can be loaded, the recipe it is of (None: it is no run's), and how many tokens it writes."""

    source: Source
    recipe: Recipe | None = None
    run: RunDirectory | None = None

    @property
    def max_new_tokens(self) -> int:
        """Return how long a completion may be: as long as in the evaluation of the run."""
        return NEW_TOKENS if self.recipe is None else self.recipe.eval.max_new_tokens or NEW_TOKENS

    def decoding(self, max_new_tokens: int | None, temperature: float | None) -> Decoding:
        """Return how the model answers: as in the evaluation of the run, greedily without a temperature."""
        length = max_new_tokens or self.max_new_tokens
        decoding = Decoding(length) if self.recipe is None else Answering(self.recipe.eval).greedy()
        return replace(decoding, max_new_tokens=length, temperature=temperature)


def find_model(path: Path, system: str | None, systems: tuple[str, ...] = SYSTEMS) -> FinishedModel:
    """Find a system of a run, PPO's or else SFT's unless one is named, or the model in a folder of its own.

    Raises:
        ValueError: there is no such model, or its stage is not finished.
    """
    recipe_file, run = path / "recipe.yaml", RunDirectory(path)
    if not recipe_file.is_file():
        if system is not None:
            raise ValueError(f"--system {system}: {str(path)!r} is no run directory (it has no recipe.yaml)")
        if not any((path / name).is_file() for name in CONFIG_FILES):
            raise ValueError(f"{str(path)!r} is neither a run directory nor the folder of a model")
        return FinishedModel(Source("model", path, ModelConfig(model_name_or_path=str(path))))
    recipe = load_stored_recipe(recipe_file)
    sources = finished_sources(recipe, run)
    name = system or ("ppo" if "ppo" in sources else "sft")
    if name == "ppo" and name in sources and not is_current(recipe, run, "ppo", "sft"):
        place = f" in {recipe.ppo.sft_model_path!r}" if recipe.sft_is_external else ""
        raise ValueError(
            f"{str(path)!r}: the sft stage{place} was made again after ppo, which was trained from what it was "
            "before; run ppo again, or name --system sft"
        )
    if name not in systems or name not in sources:
        finished = [trained for trained in TRAINED if trained in sources]
        there = f"finished: {', '.join(finished)}" if finished else "run its recipe first"
        raise ValueError(f"{str(path)!r} has no finished {name} stage; {there}")
    check_place(run, sources[name])
    return FinishedModel(sources[name], recipe, run)


def check_place(run: RunDirectory, source: Source) -> None:
    """Refuse a model from a folder that is not there: its path would be taken for an id of the Hub.

    Raises:
        ValueError: with the path.
    """
    states = [read_record(run.record_file(stage)).get("inputs", {}) for stage in (*TRAINED, "eval")]
    for path in filter(None, (source.path, source.base)):
        was_folder = any(len(read.get(str(Path(path).expanduser()), "")) == FOLDER_STATE for read in states)
        if was_folder and not Path(path).expanduser().is_dir():
            raise ValueError(
                f"{str(run.path)!r}: its recipe names the model {str(path)!r}, and that folder is neither here nor "
                "where the run was made; run this in the folder that has it"
            )


def find_systems(path: Path) -> list[FinishedModel]:
    """Find the base of a run and its trained models.

    Raises:
        ValueError: it is no run directory, or nothing is trained yet.
    """
    newest = find_model(path, None)
    if newest.recipe is None or newest.run is None:
        raise ValueError(f"{str(path)!r} is no run directory (it has no recipe.yaml), so there is nothing to compare")
    sources = finished_sources(newest.recipe, newest.run)
    for source in sources.values():
        check_place(newest.run, source)
    return [FinishedModel(source, newest.recipe, newest.run) for source in sources.values()]


def finished_sources(recipe: Recipe, run: RunDirectory) -> dict[str, Source]:
    """Return where the base of a run is, and its models whose stages are finished."""
    sft = sft_model_path(recipe, run)
    sources = {"base": Source("base", base_model_path(recipe, run), recipe.model)}
    if recipe.sft_is_external or (run.sft / FINISHED).is_file():
        sources["sft"] = Source("sft", sft, recipe.model)
    if (run.ppo / FINISHED).is_file():
        sources["ppo"] = Source("ppo", run.ppo, recipe.model, sft)
    return sources


def is_current(recipe: Recipe, run: RunDirectory, stage: str, *needed: str) -> bool:
    """Tell whether stages that a finished stage has read are as they were then, as far as its record says.

    An SFT model of another run is the stage `sft`; one that no stage has made is taken to be the same.
    """
    read, places = read_record(run.record_file(stage)).get("inputs", {}), {name: run.stage(name) for name in needed}
    if recipe.sft_is_external and "sft" in needed:
        del places["sft"]
        model = Path(sft_model_path(recipe, run)).expanduser()
        if RunDirectory(model.parent).record_file(model.name) is not None:
            places[str(Path(recipe.ppo.sft_model_path).expanduser())] = model
    return all(read[name] == record_digest(place) for name, place in places.items() if name in read)


def is_chat_run(recipe: Recipe | None) -> bool:
    """Tell whether a chat may go on after the first answer: a prompt around a source text stands alone."""
    return recipe is None or not isinstance(recipe.task.config, parallel.Config)


def prompt_from(recipe: Recipe | None, text: str, has_template: bool) -> str | list[Message]:
    """Return what a model reads of a text: a source text of parallel data goes into the prompt of its task.

    Of other tasks the text is the whole prompt. It becomes the turn of a user where the run's prompts were chats, or
    where a model without a run has a chat template.
    """
    if recipe is None:
        return as_user_turn(text) if has_template else text
    config = task_config(recipe)
    if isinstance(config, parallel.Config):
        return parallel.prompt_of_source(config, text)
    chat = getattr(config, "chat", None)  # speech and tasks of the user have no such key
    if chat is True or (chat == "auto" and has_template):
        return with_system(as_user_turn(text), config.system)
    return text


def report_of(recipe: Recipe, run: RunDirectory) -> dict | None:
    """Return report.json of a run's evaluation; None where there is none, or one of models that were made again."""
    file = run.eval / "report.json"
    if not is_current(recipe, run, "eval", *TRAINED):
        return None
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
