"""Check that a release is whole: its versions agree, and its wheel, built from its sdist, has every file.

python -m build --outdir build/release && python -m tools.release_check build/release
"""

import email
import re
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where a version stands besides pyproject.toml. The first match counts, in the changelog that of the newest release.
PLACES = {
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## (\d\S*)",
    "docs/command-line.md": r"trl_relay-([\d.]+)-py3",
}


def version(root: Path) -> str:
    """Return the version of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def version_problems(root: Path) -> list[str]:
    """List the files that name another version than pyproject.toml."""
    expected, problems = version(root), []
    for name, pattern in PLACES.items():
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M)
        named = match[1] if match else "no version"
        if named != expected:
            problems.append(f"{name}: {named}, and pyproject.toml has {expected}")
    return problems


def file_problems(root: Path, folder: Path) -> list[str]:
    """List what the wheel and the sdist in `folder` lack."""
    stem = f"trl_relay-{version(root)}"
    wheel, sdist = folder / f"{stem}-py3-none-any.whl", folder / f"{stem}.tar.gz"
    missing = [f"{file.name}: there is no such file in {folder}" for file in (wheel, sdist) if not file.is_file()]
    if missing:
        return missing
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{stem}.dist-info/METADATA"))
    problems = [f"{wheel.name}: {name} is missing" for name in sorted(package_files(root) - names)]
    if metadata["Version"] != version(root) or not metadata.get_payload():
        problems.append(f"{wheel.name}: its metadata have another version or no description")
    if f"{stem}.dist-info/licenses/LICENSE" not in names:
        problems.append(f"{wheel.name}: the licence is missing")
    return problems


def package_files(root: Path) -> set[str]:
    """Return the files that a wheel needs: all of pipeline/, and recipes/, which a link brings into it."""
    folders = {"pipeline": root / "pipeline", "pipeline/cli/recipes": root / "recipes"}
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for prefix, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def main(words: Sequence[str]) -> int:
    """Print the problems of the release in a folder; return 1 where there are any."""
    problems = [*version_problems(ROOT), *file_problems(ROOT, Path(words[0]))]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if "\n## Unreleased" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        print("note: CHANGELOG.md has a section 'Unreleased'; a release gives it a version and a date")
    if not problems:
        print(f"trl-relay {version(ROOT)}: versions agree, wheel and sdist are whole")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
