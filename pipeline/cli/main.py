"""The command `relay`: choose the file of a command, and import nothing that another one needs."""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "init": "write a recipe for your own data, and check it with the first rows",
    "recipes": "list the recipes that are installed, show one, or copy one with its data",
    "check": "check a recipe and print what a run of it would do; no run begins",
    "run": "run the stages of a recipe; the same command continues an interrupted run",
    "watch": "show the curves and samples of a run in the browser while it trains",
    "report": "print the verdict of a run, or open its report",
    "compare": "set two or more evaluated runs side by side",
    "generate": "let a model of a run, or any model in a folder, answer a prompt",
    "export": "write a model of a run as a folder that transformers loads by itself",
    "push": "upload a model of a run, with its card, to the Hugging Face Hub",
    "doctor": "say what is installed, what this machine has and what would run where; test it in a minute",
    "completion": "print the script by which a shell completes the words of relay",
}
FILES = {"check": "run"}  # the file of a command's code where it is not named like the command
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
    return code_of(name, "command")(words)


def code_of(name: str, kind: str) -> Callable:
    """Return the function `NAME_command` or `NAME_parser` of one of `COMMANDS`.

    It is imported only now: the imports of commands that train take seconds.
    """
    return pkgutil.resolve_name(f"pipeline.cli.{FILES.get(name, name)}_command:{name}_{kind}")


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
