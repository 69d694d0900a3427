"""relay init: write a recipe from four answers, and check it with the first rows of the data."""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.data_files import DataFiles, find_data
from pipeline.cli.first_rows import describe_first_rows
from pipeline.cli.parsers import make_parser
from pipeline.cli.recipe_draft import SCRATCH, Draft, draft_text
from pipeline.evaluation.pages.page import visible
from pipeline.metrics import METRIC_NAMES
from pipeline.rewards import LEARNED
from pipeline.runtime.files import write_atomically
from pipeline.runtime.libraries import quiet_libraries
from pipeline.runtime.messages import one_line

EXAMPLE = """\
examples:
  relay init                                              # asks four questions
  relay init qa.yaml --model scratch --data questions.csv
  relay init chat.yaml --model Qwen/Qwen2.5-0.5B-Instruct --data chats.jsonl --reward rougeL
  relay init mt.yaml --model scratch --data corpus.en corpus.de --task language=de
"""


@dataclass(frozen=True)
class RecipeAnswers:
    """What a user wants: a model, files, keys of the task over those that were guessed, and rewards."""

    model: str
    data: DataFiles
    task: Mapping[str, str]
    rewards: tuple[str, ...]


def init_command(argv: Sequence[str]) -> int:
    """Write the recipe; return 2 where something is missing, or the data or a reward cannot be used."""
    arguments = init_parser().parse_args(argv)
    quiet_libraries()
    recipe = arguments.recipe
    try:
        if recipe.exists():
            raise ValueError(f"{str(recipe)!r} exists; remove it, or name another file")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", recipe.stem) or recipe.suffix != ".yaml":
            raise ValueError(f"{str(recipe)!r} names a run too: use letters, digits, '_' and '-', then .yaml")
        answers = ask(arguments)
        lines = write_and_check(recipe, answers)
    except (ValueError, OSError, EOFError, KeyboardInterrupt) as error:
        print(f"error: init: {one_line(error) or 'no answer'}", file=sys.stderr)
        return 2
    print(visible("\n".join([*lines, f"wrote {recipe}; next: relay check {recipe}"])))
    return 0


def ask(arguments: argparse.Namespace) -> RecipeAnswers:
    """Return the answers: of the command line, else of the questions that are left.

    Raises:
        ValueError: there is nobody to ask, or an answer cannot be used.
    """
    asks = sys.stdin.isatty()
    if not asks and (arguments.model is None or arguments.data is None):
        raise ValueError("nobody can be asked, because stdin is no terminal: give --model and --data")
    model = arguments.model or question("Model: a folder, an id on the Hub, or scratch for random weights", SCRATCH)
    names = arguments.data or shlex.split(question("Data: a file, or two files of parallel text"))
    data = find_data(names, arguments.recipe)
    given = arguments.task
    if given is None and asks:
        shown = " ".join(f"{key}={shlex.quote(value)}" for key, value in data.guess.items()).replace("\n", "\\n")
        print(visible(data.problem or ""), end="\n" if data.problem else "")
        given = shlex.split(question("Task: what an example is, as keys of the task section", shown))
    task = named_task_keys(data, given or [])
    rewards = arguments.reward
    if rewards is None and asks:
        rewards = shlex.split(question(f"Reward: {', '.join(METRIC_NAMES)}, or file.py:function", usual_reward(data)))
    if LEARNED in (rewards or []):
        raise ValueError("--reward learned: it needs a reward section in the recipe; begin with a metric")
    return RecipeAnswers(model, data, task, tuple(rewards or [usual_reward(data)]))


def question(text: str, default: str = "") -> str:
    """Ask at the terminal; an empty answer is the default."""
    answer = input(f"{text}{f' [{default}]' if default else ''}: ").strip() or default
    if not answer:
        raise ValueError(f"no answer to {text!r}")
    return answer


def usual_reward(data: DataFiles) -> str:
    """Return the metric that is usual for a kind of task."""
    return "bleu" if data.task == "parallel" else "rougeL"


def named_task_keys(data: DataFiles, words: Sequence[str]) -> dict[str, str]:
    """Return the keys of an example: those of KEY=VALUE words over the guess.

    Raises:
        ValueError: a word without `=`, or no guess and nothing in its place.
    """
    if wrong := [word for word in words if not re.fullmatch(r"\w+=.*", word, re.DOTALL)]:
        raise ValueError(f"--task: write KEY=VALUE, such as prompt=question, found {wrong[0]!r}")
    given = {key: value.replace("\\n", "\n") for key, _, value in (word.partition("=") for word in words)}
    if data.problem and not {"prompt", "messages"} & given.keys():
        raise ValueError(f"--task: {data.problem.removeprefix('task: ')}")
    replaced = ("prompt", "completion", "references") if "messages" in given else ()
    if {"prompt", "completion", "references"} & given.keys():
        replaced = ("messages",)
    if {"completion", "references"} & given.keys():
        replaced += ("completion", "references")
    return {key: value for key, value in data.guess.items() if key not in replaced} | given


def write_and_check(recipe: Path, answers: RecipeAnswers) -> list[str]:
    """Write the recipe, and the splits of parallel files; return what the first rows show.

    Raises:
        ValueError: they cannot be used; then nothing is left behind.
    """
    data = answers.data
    keys = {**data.places, **answers.task}
    draft = Draft(recipe.stem, str(recipe), answers.model, data.task, keys, answers.rewards)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    try:
        for file, text in (data.pieces or {}).items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        write_atomically(recipe, draft_text(draft))
        return describe_first_rows(recipe)
    except BaseException:
        recipe.unlink(missing_ok=True)
        for folder in {file.parent for file in data.pieces or {}}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def init_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay init`."""
    parser = make_parser("init", __doc__, EXAMPLE)
    parser.add_argument(
        "recipe", nargs="?", type=Path, default=Path("recipe.yaml"), metavar="RECIPE", help="a new file"
    )
    parser.add_argument("--model", metavar="MODEL", help=f"a folder, an id on the Hub, or {SCRATCH}: random weights")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="a file with examples, or two of parallel text")
    parser.add_argument("--task", nargs="+", metavar="KEY=VALUE", help="such as prompt=question references=answers")
    parser.add_argument("--reward", nargs="+", metavar="NAME", help="metrics, or file.py:function")
    return parser
