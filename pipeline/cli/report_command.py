"""relay report: print the verdict of a run, or open its report in a browser."""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.parsers import make_parser
from pipeline.evaluation.run_files import load_run

EXAMPLE = """\
examples:
  relay report runs/quickstart
  relay report runs/quickstart --open
"""


def report_command(argv: Sequence[str]) -> int:
    """Print verdict, findings and warnings, and where the report is; return 2 where the run has none."""
    arguments = report_parser().parse_args(argv)
    try:
        run = load_run(arguments.run)
    except ValueError as error:
        print(f"error: report: {error}", file=sys.stderr)
        return 2
    lines = [run.report["verdict"], *run.report["findings"]]
    lines += [f"warning: {warning}" for warning in run.report["warnings"]]
    page = arguments.run / "eval" / "report.html"
    print("\n".join([*lines, f"report: {page}"]))
    if arguments.open and not webbrowser.open(page.resolve().as_uri()):
        print(f"error: report: no browser could be started; open {page}", file=sys.stderr)
        return 1
    return 0


def report_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay report`."""
    parser = make_parser("report", __doc__, EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser
