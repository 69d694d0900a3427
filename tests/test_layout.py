"""How the code hangs together: who may import whom, what files may be called, and what the README says there is."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "pipeline"
OF_SCRIPTS = r"sft|reward|ppo|eval|run|recipe|recipe_\w+|run_directory|run_lock|stage|process_group|supported|launcher"
SCRIPT = re.compile(rf"pipeline\.({OF_SCRIPTS})")
# What each package may import of ours, beside itself.
ALLOWED = {
    "tasks": set(),
    "metrics": set(),
    "models": set(),
    "rewards": {"metrics", "models"},
    "trainers": {"rewards", "models"},
    "evaluation": {"metrics", "models"},
}
MAX_LINES = 450
FILES = sorted(path for path in PIPELINE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every dotted name a file imports: `x.y` for `from x import y`; relative ones start with a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def packages() -> list[str]:
    return sorted(path.parent.name for path in PIPELINE.glob("*/__init__.py"))


def test_every_package_has_a_rule():
    assert packages() == sorted(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_dependency_rule(path):
    ours = {name for name in imports(path) if name.split(".")[0] == "pipeline"}
    if path.parent == PIPELINE:
        assert path.stem == "__init__" or SCRIPT.fullmatch(name_of(path)), f"{path.name}: a script of no known name"
        stages = {name for name in ours if re.match(r"pipeline\.(sft|reward|ppo|eval|run)(\.|$)", name)}
        assert not stages, f"stage scripts are imported by nobody, {path.name} imports {sorted(stages)}"
        return
    package = path.relative_to(PIPELINE).parts[0]
    for name in ours:
        other = name.split(".")[1:2]
        assert set(other) <= {package} | ALLOWED[package], f"{name_of(path)} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_are_absolute_and_of_trl_only_its_own_names(path):
    for name in imports(path):
        assert not name.startswith("."), f"{name_of(path)}: relative import {name}"
        if name.startswith("trl."):
            assert name.count(".") == 1 and find_spec(name) is None, f"{name_of(path)}: {name} may go without notice"
    assert "trl.experimental" not in path.read_text(encoding="utf-8")


def test_names_that_a_launched_script_would_put_before_libraries():
    # `accelerate launch pipeline/x.py` puts pipeline/ first on sys.path.
    names = {path.stem for path in PIPELINE.glob("*.py")} - {"__init__"} | {
        path.name for path in PIPELINE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"trl-relay"}}
    assert {"sft", "ppo", "eval", "metrics"} <= names
    assert not names & (sys.stdlib_module_names | installed)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_have_one_duty_and_say_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    duty = ast.get_docstring(ast.parse(text))
    assert duty and duty.splitlines()[0].endswith("."), f"{name_of(path)} does not say what it is for"


def readme_tree() -> dict[str, str]:
    """Path -> duty of every line of the README's file tree below `pipeline/`.

    The tree is the first fenced block with a line `pipeline/`. Depth is given by the indentation, whatever lines are
    drawn in it; a directory's name ends with a slash; its duty stands two spaces behind a name.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    block = next(b for b in blocks if re.search(r"^\W*pipeline/(\s|$)", b, re.M))
    tree: dict[str, str] = {}
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        if not (match := re.match(r"([^\w.]*)(\S+)(?:\s{2,}(.*))?", line)):
            continue
        depth, name, duty = len(match[1]), match[2], (match[3] or "").strip()
        folders = [(d, folder) for d, folder in folders if d < depth]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((depth, name))
        tree[path] = duty
    return {path: duty for path, duty in tree.items() if path.startswith("pipeline/") and path != "pipeline/"}


def test_the_readme_shows_the_files_there_are():
    tree = readme_tree()
    files = {f"pipeline/{path.name}" for path in PIPELINE.glob("*.py") if path.name != "__init__.py"}
    there = files | {f"pipeline/{package}/" for package in packages()}
    shown = {path for path in tree if path.count("/") == (2 if path.endswith("/") else 1)}
    assert shown == there
    deeper = {path for path in tree if path not in shown}
    assert all((ROOT / path).exists() for path in deeper)
    assert [path for path, duty in tree.items() if not duty] == []
