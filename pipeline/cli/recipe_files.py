"""The recipes that come with the package, by name."""

import re
from pathlib import Path

# In a clone a link to recipes/ at its top; in a wheel the files themselves.
RECIPES = Path(__file__).parent / "recipes"


def recipe_files() -> dict[str, Path]:
    """Return the file of each recipe, by name."""
    return {file.stem: file.resolve() for file in sorted(RECIPES.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """Return the file that `name` means: a path, or the name of a recipe where no such file exists."""
    return Path(name) if Path(name).is_file() else recipe_files().get(name, Path(name))


def first_sentence(file: Path) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    return re.split(r"(?<=[.;:])\s", " ".join(comment))[0].rstrip(".;:")


def files_beside(file: Path) -> list[Path]:
    """Return what a recipe needs of its folder: data, `{recipe_dir}/name`, code, `name.py:thing`, and scripts."""
    pattern = r"\{recipe_dir\}/([\w-]+)|\b([\w-]+\.py):\w|python recipes/([\w-]+\.py)"
    names = re.findall(pattern, file.read_text(encoding="utf-8"))
    paths = (file.parent / (data or code or script) for data, code, script in dict.fromkeys(names))
    return [path for path in paths if path.exists()]
