"""The versions of libraries that Relay works with; imported first by the scripts, it ends them where one does not fit.

The ranges are those of pyproject.toml, read from the installed package.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

PACKAGE = "trl-relay"


def unsupported() -> list[str]:
    """What is wrong with the installed libraries: `trl 1.2.0 is installed, Relay needs trl>=1.13`, and so on.

    Nothing is known where Relay itself is not installed but run from its folder.
    """
    try:
        needed = [Requirement(line) for line in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return []
    problems = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        known = f"{requirement.name}{requirement.specifier}"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed, Relay needs {known}")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is installed, Relay needs {known}")
    return problems


if problems := unsupported():
    if os.environ.get("RANK", "0") == "0":
        advice = "pip install --constraint constraints.txt --editable . installs the tested versions"
        print(f"error: {'; '.join(problems)}; {advice}", file=sys.stderr)
    raise SystemExit(2)
