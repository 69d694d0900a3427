"""The command line of a stage: `[RECIPE] [section.key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.recipe.checks import load_checked_recipe
from pipeline.recipe.document import RecipeError
from pipeline.recipe.types import Recipe
from pipeline.runtime.messages import one_line

DEFAULT_RECIPE = Path("recipes/quickstart.yaml")


def parse_stage_arguments(argv: Sequence[str], description: str) -> Recipe:
    """Load and check the recipe that a stage's command line names.

    A recipe that cannot be run ends the process with exit code 2 and one sentence on stderr, without a traceback.
    """
    return _parse(argv, description)[0]


def parse_arguments_of_stages(argv: Sequence[str], description: str, stages: Sequence[str]) -> tuple[Recipe, str]:
    """Do the same for a script that runs several stages; return the one that `--stage` names too, else the first."""
    return _parse(argv, description, stages)


def _parse(argv: Sequence[str], description: str, stages: Sequence[str] = ()) -> tuple[Recipe, str]:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"a YAML file (default: {DEFAULT_RECIPE})")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe, as YAML"
    )
    if stages:
        parser.add_argument("--stage", choices=stages, default=stages[0], help=f"default: {stages[0]}")
    arguments = parser.parse_intermixed_args(argv)
    path, overrides = split_recipe_argument([arguments.recipe or "", *arguments.overrides])
    try:
        recipe = load_checked_recipe(path, overrides, int(os.environ.get("WORLD_SIZE", "1")))
    except RecipeError as error:
        exit_with_error(str(error))
    return recipe, arguments.stage if stages else ""


def split_recipe_argument(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """Split positional arguments into the recipe's path and the overrides: the first is the path unless it has a `=`.

    A file that is there may have one in its path, too. Without a path it is recipes/quickstart.yaml, in the current
    directory or else where Relay is installed from.
    """
    words = [word for word in arguments if word]
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return Path(words[0]), words[1:]
    installed = Path(__file__).resolve().parent.parent.parent / DEFAULT_RECIPE
    return DEFAULT_RECIPE if DEFAULT_RECIPE.is_file() or not installed.is_file() else installed, words


def exit_with_error(message: str) -> NoReturn:
    """End this process with exit code 2 and `error: message` on stderr, written by one process of a group."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)
