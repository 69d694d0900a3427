"""pyproject.toml: every library that Relay imports is declared, and the bounds are those that are tested."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDED = {"transformers", "trl", "peft", "accelerate", "datasets"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


DECLARED = requirements(PROJECT["dependencies"])


def pins(file: str) -> dict[str, Version]:
    """Library -> version of a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def third_party_imports() -> set[str]:
    """First words of the imports of `pipeline/`, without the standard library's."""
    names = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"pipeline"}


def test_every_import_is_declared():
    owners = packages_distributions()
    optional = requirements([line for lines in PROJECT["optional-dependencies"].values() for line in lines])
    for name in third_party_imports():
        distributions = {canonicalize_name(owner) for owner in owners.get(name, [name])}
        assert distributions & (DECLARED.keys() | optional.keys()), name
    assert {"torch", "numpy", "ruamel"} <= third_party_imports()


def test_the_libraries_that_relay_relies_on_most_have_an_upper_bound():
    bounded = {name for name, line in DECLARED.items() if "<" in {part.operator for part in line.specifier}}
    assert bounded == BOUNDED


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins("tests/versions/oldest.txt")
    assert oldest.keys() == DECLARED.keys()
    for name, line in DECLARED.items():
        [lower] = [Version(part.version) for part in line.specifier if part.operator == ">="]
        assert oldest[name] == lower or name == "torch", name


@pytest.mark.parametrize("file", ["constraints.txt", "tests/versions/oldest.txt", "tests/versions/newest.txt"])
def test_tested_versions_are_within_the_bounds(file):
    versions = pins(file)
    assert versions.keys() >= BOUNDED | {"torch"}
    for name, version in versions.items():
        assert name not in DECLARED or version in DECLARED[name].specifier, name


def test_the_newest_versions_are_those_below_the_upper_bounds():
    newest = pins("tests/versions/newest.txt")
    for name in BOUNDED - {"datasets"}:  # whose upper bound is the next major version
        [upper] = [Version(part.version) for part in DECLARED[name].specifier if part.operator == "<"]
        major, minor, *_ = newest[name].release
        assert upper == Version(f"{major}.{minor + 1}"), name
