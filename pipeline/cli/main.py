"""The command `relay`: choose the file of a command, and import nothing that another one needs."""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "recipes": "list the recipes that are installed, show one, or copy one with its data",
    "check": "check a recipe and print what a run of it would do; nothing is written",
    "run": "run the stages of a recipe; the same command continues an interrupted run",
    "report": "print the verdict of a run, or open its report",
    "compare": "set two or more evaluated runs side by side",
    "generate": "let a model of a run, or any model in a folder, answer a prompt",
    "export": "write a model of a run as a folder that transformers loads by itself",
}
EXAMPLE = """\
  relay recipes copy quickstart
  relay run quickstart.yaml
  relay report runs/quickstart --open
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code, 2 where there is no such command."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"relay {installed_version()}")
        return 0
    if name not in COMMANDS:
        from pipeline.runtime.messages import did_you_mean  # which loads torch

        print(f"error: no command {name!r}{did_you_mean(name, COMMANDS)}; see relay --help", file=sys.stderr)
        return 2
    return run_named(name, words)


def run_named(name: str, words: Sequence[str]) -> int:
    """Run one of `COMMANDS`, whose imports take seconds for those that train."""
    match name:
        case "recipes":
            from pipeline.cli.recipes_command import recipes_command

            return recipes_command(words)
        case "check":
            from pipeline.cli.run_command import check_command

            return check_command(words)
        case "run":
            from pipeline.cli.run_command import run_named_recipe

            return run_named_recipe(words)
        case "report":
            from pipeline.cli.report_command import report_command

            return report_command(words)
        case "generate":
            from pipeline.cli.generate_command import generate_command

            return generate_command(words)
        case "export":
            from pipeline.cli.export_command import export_command

            return export_command(words)
        case _:
            from pipeline.evaluation.pages.runs_pages import compare_command

            return compare_command(words, "relay compare")


def usage() -> str:
    """Return what `relay --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: relay COMMAND ...", "", *lines, "", "relay COMMAND --help says more.", "", EXAMPLE])


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("trl-relay")
    except PackageNotFoundError:
        return "from a folder"
