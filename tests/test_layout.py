"""How the code hangs together: who may import whom, what files may be called, and the tree of CONTRIBUTING.md."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from transformers import Trainer

from tools.figures import CONTRACT

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "pipeline"
SCRIPTS = {"sft", "reward", "ppo", "eval", "run"}
# What each package may import of ours, beside itself.
ALLOWED = {
    "runtime": set(),
    "tasks": {"runtime"},
    "metrics": {"runtime"},
    "models": {"runtime"},
    "rewards": {"metrics", "models", "runtime"},
    "trainers": {"rewards", "models", "runtime"},
    "evaluation": {"rewards", "metrics", "models", "runtime"},
    "recipe": {"evaluation", "metrics", "models", "rewards", "runtime", "tasks", "trainers"},
    "stages": {"recipe", "evaluation", "metrics", "models", "rewards", "runtime", "tasks", "trainers"},
    "cli": {"recipe", "stages", "evaluation", "metrics", "models", "rewards", "runtime", "tasks", "trainers"},
}
# A room inside a package -> who may import it beside itself: faster ways to compute are the models' own.
INNER = {"pipeline.models.kernels": "pipeline.models"}
# Only here may a private name of transformers' trainers be touched.
PERIMETER = PIPELINE / "trainers" / "huggingface"
MAX_LINES = 300
MAX_SCRIPT_LINES = 60
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


def imports_of_ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "pipeline"}


def test_every_package_has_a_rule_and_every_other_file_is_a_script():
    assert packages() == sorted(ALLOWED)
    assert {path.stem for path in PIPELINE.glob("*.py")} - {"__init__"} == SCRIPTS


def test_imports_follow_the_dependency_rule():
    for path in FILES:
        for name in imports_of_ours(path):
            room = name.split(".")[1] if "." in name else ""
            assert room not in SCRIPTS, f"{name_of(path)}: scripts are imported by nobody, not {name}"
            if path.parent != PIPELINE:
                package = path.relative_to(PIPELINE).parts[0]
                assert room in {package} | ALLOWED[package], f"{name_of(path)} may not import {name}"
            for inner, owner in INNER.items():
                if name.startswith(inner):
                    assert name_of(path).startswith(owner), f"{name_of(path)} may not import {name}, only {owner} may"


def test_figures_do_not_import_the_pages_that_show_them():
    evaluation = PIPELINE / "evaluation"
    for path in evaluation.glob("*.py"):
        pages = {name for name in imports_of_ours(path) if name.startswith("pipeline.evaluation.pages")}
        assert not pages, f"{name_of(path)} may not import {', '.join(sorted(pages))}"


def test_packages_import_each_other_in_one_direction():
    # Between modules, not only between packages: a circle of two files cannot be read in any order.
    graph = {name_of(path): set() for path in FILES}
    for path in FILES:
        for name in imports_of_ours(path):
            while name and name not in graph:
                name = name.rpartition(".")[0]
            graph[name_of(path)].add(name)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in graph[module] - {module, "pipeline"}:
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_private_names_of_transformers_trainers_stay_in_one_room():
    private = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    for path in FILES:
        if PERIMETER in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            inherits = isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases)
            assert not inherits or ast.unparse(node.bases[0]) == "TrainerCallback", f"{name_of(path)}: {node.name}"
            if isinstance(node, ast.Attribute) and "trainer" in ast.unparse(node.value):
                assert node.attr not in private, f"{name_of(path)} touches {ast.unparse(node)}"


def test_imports_are_absolute_and_of_trl_only_its_own_names():
    for path in FILES:
        for name in imports(path):
            assert not name.startswith("."), f"{name_of(path)}: relative import {name}"
            if name.startswith("trl."):
                alone = name.count(".") == 1 and find_spec(name) is None
                assert alone, f"{name_of(path)}: {name} may go without notice"
        assert "trl.experimental" not in path.read_text(encoding="utf-8")


def test_names_that_a_launched_script_would_put_before_libraries():
    # `accelerate launch pipeline/x.py` puts pipeline/ first on sys.path.
    names = {path.stem for path in PIPELINE.glob("*.py")} - {"__init__"} | {
        path.name for path in PIPELINE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"trl-relay"}}
    assert {"sft", "ppo", "eval", "metrics"} <= names
    assert not names & (sys.stdlib_module_names | installed)


def test_files_have_one_duty_and_say_it():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        limit = MAX_SCRIPT_LINES if path.parent == PIPELINE else MAX_LINES
        assert len(text.splitlines()) <= limit, f"{name_of(path)} is longer than {limit} lines"
        duty = ast.get_docstring(ast.parse(text))
        assert duty and duty.splitlines()[0].endswith("."), f"{name_of(path)} does not say what it is for"


def test_no_two_public_names_are_the_same():
    """A word has one meaning, but for the names that a contract prescribes."""
    homes: dict[str, str] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_" and node.name not in CONTRACT:
                home = homes.setdefault(node.name, name_of(path))
                assert home == name_of(path), f"{home} and {name_of(path)} both define {node.name}"


def test_scripts_hold_no_classes():
    for script in SCRIPTS:
        tree = ast.parse((PIPELINE / f"{script}.py").read_text(encoding="utf-8"))
        assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], script


def drawn_tree() -> dict[str, str]:
    """Path -> duty of every line of the file tree of CONTRIBUTING.md below `pipeline/`.

    The tree is the first fenced block with a line `pipeline/`. Depth is given by the indentation, whatever lines are
    drawn in it; a directory's name ends with a slash; its duty stands two spaces behind a name.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
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


def test_the_tree_shows_the_files_there_are():
    tree = drawn_tree()
    files = {f"pipeline/{path.name}" for path in PIPELINE.glob("*.py") if path.name != "__init__.py"}
    there = files | {f"pipeline/{package}/" for package in packages()}
    shown = {path for path in tree if path.count("/") == (2 if path.endswith("/") else 1)}
    assert shown == there
    deeper = {path for path in tree if path not in shown}
    assert all((ROOT / path).exists() for path in deeper)
    assert [path for path, duty in tree.items() if not duty] == []
