"""relay recipes: list the recipes that are installed, show one, or copy one with its data."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.parsers import make_parser
from pipeline.cli.recipe_files import files_beside, first_sentence, recipe_files

EXAMPLE = """\
examples:
  relay recipes list
  relay recipes show quickstart
  relay recipes copy quickstart            # quickstart.yaml and phrasebook/ in this folder
  relay recipes copy quickstart --to work
"""
COMMANDS_OF_COPY = {"python pipeline/run.py recipes/": "relay run ", "python recipes/": "python "}


def recipes_command(argv: Sequence[str]) -> int:
    """Run `list`, `show NAME` or `copy NAME`; return 2 where there is no such recipe, or a file is in the way."""
    arguments = recipes_parser().parse_args(argv)
    files = recipe_files()
    if arguments.action == "list":
        width = max(map(len, files))
        print("\n".join(f"{name:<{width}}  {first_sentence(file)}" for name, file in files.items()))
        return 0
    name = arguments.name
    if name not in files:
        from pipeline.runtime.messages import did_you_mean  # which loads torch

        return refuse(f"no recipe {name!r}{did_you_mean(name, files)}; relay recipes list names them")
    if arguments.action == "show":
        print(files[name].read_text(encoding="utf-8"), end="")
        return 0
    try:
        copied = copy_recipe(files[name], arguments.to)
    except OSError as error:
        return refuse(f"recipes copy: {error}")
    print("\n".join(map(str, copied)))
    return 0


def recipes_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay recipes`."""
    parser = make_parser("recipes", __doc__, EXAMPLE)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | show NAME | copy NAME")
    actions.add_parser("list", help="name each recipe and say what it trains")
    actions.add_parser("show", help="print a recipe").add_argument("name", metavar="NAME")
    copy = actions.add_parser("copy", help="copy a recipe, and the data and code that come with it", epilog=EXAMPLE)
    copy.formatter_class = argparse.RawDescriptionHelpFormatter
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="default: this folder")
    return parser


def copy_recipe(file: Path, folder: Path) -> list[Path]:
    """Copy a recipe, its data folders and its code into `folder`; return what was written.

    The commands in its comments become those of the copy, which stands in no clone.
    What is there already is left alone: recipes share their data.

    Raises:
        FileExistsError: there is a file of the recipe's name, which may hold somebody's changes.
    """
    target = folder / file.name
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it, or copy to another folder with --to")
    folder.mkdir(parents=True, exist_ok=True)
    written = [target]
    for source in files_beside(file):
        if not (folder / source.name).exists():
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / source.name)
            written.append(folder / source.name)
    text = file.read_text(encoding="utf-8")
    for command, other in COMMANDS_OF_COPY.items():
        text = text.replace(command, other)
    target.write_text(text, encoding="utf-8")
    return written


def refuse(message: str) -> int:
    """Print on stderr what is wrong; return 2."""
    print(f"error: {message}", file=sys.stderr)
    return 2
