"""relay compare: set evaluated runs side by side; also `python pipeline/eval.py compare`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.parsers import Parser
from pipeline.evaluation.pages.runs_pages import write_comparison
from pipeline.runtime.user_code import search_user_code


def compare_command(argv: Sequence[str], prog: str = "relay compare") -> int:
    """Run `compare RUN RUN ... [--output DIR]`; return 0 when it is written, 2 when a run has no report."""
    arguments = compare_parser(prog).parse_args(argv)
    runs = [run.absolute() for run in arguments.runs]
    search_user_code(Path.cwd(), *(run.parent.parent for run in runs))  # metrics of the user: runs/NAME is beside them
    try:
        write_comparison(arguments.runs, arguments.output or arguments.runs[0].parent / "comparison")
    except ValueError as error:
        print(f"error: compare: {error}", file=sys.stderr)
        return 2
    return 0


def compare_parser(prog: str = "relay compare") -> argparse.ArgumentParser:
    """Make the parser of the words after `compare`."""
    example = f"example: {prog} runs/quickstart runs/control"
    parser = Parser(prog=prog, description="Set evaluated runs side by side.", epilog=example)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: `comparison` next to the first run")
    return parser
