"""relay run and relay check: the whole chain of one recipe, and what it would do; also `python pipeline/run.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.parsers import Parser
from pipeline.cli.recipe_files import recipe_files, recipe_path
from pipeline.recipe import split_recipe_argument
from pipeline.runtime.messages import did_you_mean
from pipeline.stages.chain import Selection, run_chain, run_seeds
from pipeline.stages.directory import STAGES

USAGE = "%(prog)s [RECIPE] [section.key=value ...] [options] [-- accelerate launch options]"
RUN = """\
Run the stages of a recipe: a file, or the name of one that relay recipes list shows.
What is done and unchanged is skipped, what was interrupted continues.

examples:
  relay run quickstart
  relay run quickstart.yaml sft.num_train_epochs=2
  relay run quickstart.yaml --from ppo -- --num_processes 1
  relay run quickstart.yaml --seeds 0,1,2
"""
CHECK = """\
Check a recipe and print what a run of it would do; no run directory is made, no model is loaded.

examples:
  relay check quickstart
  relay check quickstart.yaml ppo.kl_coef=0.02
"""


def run_command(argv: Sequence[str]) -> int:
    """Run the words after `relay run`, which may name an installed recipe; return the exit code."""
    return run_found_recipe(*parse_arguments(argv, run_parser()))


def check_command(argv: Sequence[str]) -> int:
    """Print the plan of what the words after `relay check` would run; return 2 where it cannot start."""
    return run_found_recipe(*parse_arguments(["--dry-run", *argv], check_parser()))


def run_found_recipe(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Run a recipe that is given by its file or by its name; return 2 where none is given, or it is unknown."""
    words = arguments.words
    if not words or ("=" in words[0] and not Path(words[0]).is_file()):
        print("error: name a recipe: a file, or one that relay recipes list shows", file=sys.stderr)
        return 2
    path = recipe_path(words[0])
    if not path.suffix and (path.is_dir() or not path.exists()):
        hint = did_you_mean(words[0], recipe_files())
        print(f"error: no recipe {words[0]!r}{hint}; relay recipes list names them", file=sys.stderr)
        return 2
    return run_selected(arguments, options, path, words[1:])


def run_script(argv: Sequence[str], description: str | None) -> int:
    """Run the words after `python pipeline/run.py`; return the exit code."""
    arguments, options = parse_arguments(argv, chain_parser(description=description))
    return run_selected(arguments, options, *split_recipe_argument(arguments.words))


def run_selected(arguments: argparse.Namespace, options: Sequence[str], path: Path, overrides: Sequence[str]) -> int:
    """Run the chain; 0 when its stages are complete, 2 when they cannot start, else the failed one's exit code."""
    selection = Selection(arguments.only, arguments.start, arguments.force, arguments.dry_run)
    if arguments.seeds is None:
        return run_chain(path, overrides, selection, options)
    return run_seeds(arguments.seeds, path, overrides, selection, options)


def parse_arguments(
    argv: Sequence[str], parser: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return its arguments, and after `--` the options of accelerate launch."""
    words, options = list(argv), []
    if "--" in words:
        words, options = words[: words.index("--")], words[words.index("--") + 1 :]
    return (parser or chain_parser()).parse_intermixed_args(words), options


def run_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay run`."""
    return chain_parser(prog="relay run", description=RUN)


def check_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay check`."""
    return chain_parser(prog="relay check", description=CHECK)


def chain_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of a recipe, overrides, and which stages to run."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, usage=USAGE, description=description, formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="a file, and values over its own")
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--only", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    later = "this stage and those after it"
    selection.add_argument("--from", choices=STAGES, metavar="STAGE", dest="start", help=later)
    parser.add_argument("--seeds", type=seed_list, metavar="N,N,...", help="run once for each seed and sum up")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--force", action="store_true", help="run the selected stages again, keeping what they made")
    return parser


def seed_list(text: str) -> list[int]:
    """Return `0,1,2` as numbers, two or more, none twice."""
    words = text.split(",")
    seeds = [int(word) for word in words if word.isdecimal()]
    if len(seeds) < 2 or len(set(seeds)) < len(words):
        raise argparse.ArgumentTypeError(f"expected two or more different whole numbers such as 0,1,2, found {text!r}")
    return seeds
