"""The check of a release: versions that agree, files that are there, and what is said where they do not or are not."""

import shutil
import zipfile
from pathlib import Path

import pytest

from tools.release_check import PLACES, file_problems, package_files, version, version_problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files that name a version, and a package of one module with one recipe."""
    for name in ("pyproject.toml", *PLACES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("pipeline/a.py", "pipeline/b/page.html", "recipes/r.yaml", "recipes/data/x.en"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def test_the_versions_of_this_repository_agree():
    assert version_problems(ROOT) == []


@pytest.mark.parametrize("name", PLACES)
def test_another_version_is_named_by_its_file(copy, name):
    text = (copy / name).read_text()
    assert version_problems(copy) == []
    (copy / name).write_text(text.replace(version(copy), "9.9.9"))
    [problem] = version_problems(copy)
    assert name in problem and "9.9.9" in problem and version(copy) in problem


def write_release(copy: Path, names: set[str], licence: bool = True) -> None:
    stem = f"trl_relay-{version(copy)}"
    (copy / f"{stem}.tar.gz").write_text("")
    with zipfile.ZipFile(copy / f"{stem}-py3-none-any.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr(f"{stem}.dist-info/METADATA", f"Version: {version(copy)}\n\nWhat it is.\n")
        if licence:
            archive.writestr(f"{stem}.dist-info/licenses/LICENSE", "")


def test_a_wheel_without_a_recipe_or_its_licence_is_not_whole(copy):
    assert [problem.split(":")[0][-7:] for problem in file_problems(copy, copy)] == ["any.whl", ".tar.gz"]
    names = package_files(copy)
    assert "pipeline/cli/recipes/data/x.en" in names and "pipeline/b/page.html" in names
    write_release(copy, names)
    assert file_problems(copy, copy) == []
    write_release(copy, names - {"pipeline/cli/recipes/r.yaml"}, licence=False)
    recipe, licence = file_problems(copy, copy)
    assert "pipeline/cli/recipes/r.yaml is missing" in recipe and "licence" in licence
