"""The library versions that Relay works with. Scripts import it first, and it ends them if a version does not fit.

The ranges are those of pyproject.toml, read from the installed package.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

PACKAGE = "trl-relay"


def unsupported() -> list[str]:
    """List what is wrong with the installed libraries: `trl 1.2.0 is installed, Relay needs trl>=1.16`, and so on.

    The list is empty where Relay itself is not installed but run from its folder.
    """
    try:
        needed = [Requirement(line) for line in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return []
    problems = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        range_needed = f"{requirement.name}{requirement.specifier}"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed, Relay needs {range_needed}")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} is installed, Relay needs {range_needed}")
    return problems


def advice(problems: Sequence[str]) -> str:
    """Return the command that installs versions that fit in place of those that `unsupported` lists."""
    return shlex.join(["pip", "install", *(problem.rpartition("Relay needs ")[2] for problem in problems)])


NEEDED_MODULES = ("fcntl", "resource")  # of Linux and macOS: a lock of run directories, the memory of a process

if any(find_spec(name) is None for name in NEEDED_MODULES):
    print("error: Relay's stages run on Linux and macOS; on Windows install Relay in WSL 2", file=sys.stderr)
    raise SystemExit(2)
if problems := unsupported():
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {'; '.join(problems)}; {advice(problems)}", file=sys.stderr)
    raise SystemExit(2)
