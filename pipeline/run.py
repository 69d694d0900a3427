"""The whole chain of one recipe: what is done and unchanged is skipped, what was interrupted continues.

python pipeline/run.py recipes/quickstart.yaml sft.num_train_epochs=2
python pipeline/run.py recipes/quickstart.yaml --dry-run
python pipeline/run.py recipes/quickstart.yaml --from ppo -- --num_processes 1
python pipeline/run.py recipes/quickstart.yaml --seeds 0,1,2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import argparse
import sys
from collections.abc import Sequence

from pipeline.recipe import split_recipe_argument
from pipeline.stages.chain import Selection, run_chain, run_seeds
from pipeline.stages.directory import STAGES

USAGE = "%(prog)s [RECIPE] [section.key=value ...] [options] [-- accelerate launch options]"


def main(argv: Sequence[str]) -> int:
    """Run the chain; 0 when its stages are complete, 2 when they cannot start, else the failed one's exit code."""
    arguments, options = parse_arguments(argv)
    path, overrides = split_recipe_argument(arguments.words)
    selection = Selection(arguments.only, arguments.start, arguments.force, arguments.dry_run)
    if arguments.seeds is None:
        return run_chain(path, overrides, selection, options)
    return run_seeds(arguments.seeds, path, overrides, selection, options)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return its arguments, and after `--` the options of accelerate launch."""
    words, options = list(argv), []
    if "--" in words:
        words, options = words[: words.index("--")], words[words.index("--") + 1 :]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=USAGE, description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="a file, and values over its own")
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--only", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    later = "this stage and those after it"
    selection.add_argument("--from", choices=STAGES, metavar="STAGE", dest="start", help=later)
    parser.add_argument("--seeds", type=seed_list, metavar="N,N,...", help="run once for each seed and sum up")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--force", action="store_true", help="run the selected stages again, keeping what they made")
    return parser.parse_intermixed_args(words), options


def seed_list(text: str) -> list[int]:
    """Return `0,1,2` as numbers, two or more, none twice."""
    seeds = text.split(",")
    if len(seeds) < 2 or len(set(seeds)) != len(seeds) or not all(seed.isdecimal() for seed in seeds):
        raise argparse.ArgumentTypeError(f"expected two or more different whole numbers such as 0,1,2, found {text!r}")
    return [int(seed) for seed in seeds]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
