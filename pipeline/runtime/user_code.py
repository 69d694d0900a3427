"""Find and load a user's code by its name, and list the files that it is made of."""

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from pipeline.runtime.messages import did_you_mean

FORMS = "package.module.thing, package.module:thing or path/file.py:thing"
RELAY = Path(__file__).resolve().parents[1]
LIBRARIES = ("site-packages", "dist-packages")

_folders: list[Path] = []  # where a user's code is looked for first: the recipe's folder, the current one


class UserCodeError(ValueError):
    """Code that cannot be loaded by its name; the message has the name and what went wrong."""


def search_user_code(*folders: Path) -> None:
    """Find a user's code in these folders.

    They come first while such code is imported. Later they come last, so that no file in them replaces a library.
    """
    _folders[:] = dict.fromkeys(folder.absolute() for folder in folders)
    sys.path += [str(folder) for folder in _folders if str(folder) not in sys.path]


def is_user_code(name: str) -> bool:
    """Tell whether a name is that of a user's code, by its form alone."""
    return "." in name or ":" in name


def locate_file(name: str, folder: Path) -> str:
    """Return a name `path/file.py:thing` with the path from `folder`, if the file is there; any other name as it is.

    The path is relative where the current folder holds it, otherwise absolute.
    """
    source, colon, thing = name.partition(":")
    file = Path(os.path.abspath(folder / Path(source).expanduser()))
    if not source.endswith(".py") or not file.is_file():
        return name
    here = Path.cwd()
    return f"{file.relative_to(here) if file.is_relative_to(here) else file}{colon}{thing}"


def load_user_object(name: str) -> object:
    """Return what `package.module.thing`, `package.module:thing` or `path/file.py:thing` names.

    Raises:
        UserCodeError: a name of another form, or code that cannot be imported, whatever the reason.
    """
    source, thing = _split(name)
    if not source or not thing:
        raise UserCodeError(f"cannot import {name!r} (write {FORMS})")
    module = load_user_module(source, name)
    try:
        return attrgetter(thing)(module)
    except AttributeError as error:
        hint = did_you_mean(thing, [key for key in vars(module) if not key.startswith("_")])
        raise UserCodeError(f"cannot import {name!r} ({error}{hint})") from error


def load_user_module(source: str, name: str | None = None) -> ModuleType:
    """Return the module `package.module` or `path/file.py`; an error calls it `name`.

    Raises:
        UserCodeError: as `load_user_object`.
    """
    try:
        if source.endswith(".py"):
            places = [Path(source).expanduser().absolute(), *(folder / source for folder in _folders)]
            return _load_file(next((place for place in places if place.is_file()), places[0]))
        with _searched_first(_folders):
            return importlib.import_module(source)
    except Exception as error:  # a user's code may fail in any way
        kind = "" if isinstance(error, ImportError | FileNotFoundError) else f"{type(error).__name__}: "
        raise UserCodeError(f"cannot import {name or source!r} ({kind}{error})") from error


def _split(name: str) -> tuple[str, str]:
    """Return the module or file of a name, and what the name means in it."""
    source, colon, thing = name.partition(":")
    if not colon and not source.endswith(".py"):
        source, _, thing = name.rpartition(".")
    return source, thing


def _load_file(file: Path) -> ModuleType:
    """Import a file under a name that no other module has; what it imports is looked for beside it first."""
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        with _searched_first([file.parent, *_folders]):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _searched_first(folders: Iterable[Path]) -> Iterator[None]:
    """Put folders before all others on the path of modules; what the block itself adds to the path stays."""
    added = [str(folder) for folder in folders]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def user_code_files(names: Iterable[str]) -> dict[str, Path]:
    """Return the files that hold the named code and what it imports, by their paths within the folder of modules.

    Imports are read from the text of the files. Libraries, Relay itself and imports by computed names are left out.
    """
    files: dict[str, Path] = {}
    for name in names:
        source = name if name.endswith(".py") else _split(name)[0] if ":" in name else name
        if source.endswith(".py"):
            file = Path(source).expanduser().absolute()
            roots = [file.parent, *_roots()]
            _collect([(file.parent, file)], roots, files)
        else:
            _collect(_module_files(source, _roots()), _roots(), files)
    return files


def _roots() -> list[Path]:
    """Return the folders of modules that hold no libraries, those of `search_user_code` first."""
    others = [Path(entry or ".").absolute() for entry in sys.path]
    return list(dict.fromkeys([*_folders, *(p for p in others if p.is_dir() and not is_library_file(p))]))


def is_library_file(path: Path) -> bool:
    """Tell whether a file or folder is of Python, of an installed library, or of Relay itself."""
    standard = path.is_relative_to(sysconfig.get_path("stdlib"))
    return standard or bool(set(path.parts) & set(LIBRARIES)) or path.resolve().is_relative_to(RELAY)


def _collect(modules: Iterable[tuple[Path, Path]], roots: list[Path], files: dict[str, Path]) -> None:
    """Add files, each with the root of its modules, and all that they import."""
    for root, file in modules:
        if file in files.values() or is_library_file(file):
            continue
        key = file.relative_to(root).as_posix()
        files[key if key not in files else str(file)] = file
        for name in _imported_names(root, file):
            _collect(_module_files(name, roots), roots, files)


def _module_files(module: str, roots: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Return the files that importing `package.module` or `package.module.thing` runs, each with its root."""
    names = module.split(".")
    for root in roots:
        files = []
        for depth in range(1, len(names) + 1):
            folder = root.joinpath(*names[:depth])
            file = folder.with_name(f"{folder.name}.py")
            files += [(root, path) for path in (folder / "__init__.py", file) if path.is_file()][:1]
            if not folder.is_dir():
                break
        if files:
            return files
    return []


def _imported_names(root: Path, file: Path) -> Iterator[str]:
    """Read from the text of a file which modules it imports; of `from a import b` also `a.b`, which may be one."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # its import fails, or will
        return
    package = file.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names if alias.name != "*" or base)
