"""Where every value of a recipe was written, and errors that say so."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.runtime.messages import printable, redact
from pipeline.runtime.user_code import locate_file

KeyPath = tuple[str | int, ...]

MAX_MESSAGE = 1000


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one sentence with the place, the key, what was found and a fix.

    The message is one printable line of a readable length without secrets, whatever stands in the recipe.
    `unknown_key` is the key that no recipe has, where there is one.
    """

    def __init__(self, message: str, unknown_key: KeyPath | None = None) -> None:
        message, self.unknown_key = redact(message), unknown_key
        if len(message) > MAX_MESSAGE:
            middle = f" [... {len(message):,} characters ...] "
            message = message[: MAX_MESSAGE // 2] + middle + message[-MAX_MESSAGE // 4 :]
        super().__init__(printable(message))


@dataclass
class Document:
    """Plain values of a recipe, and for each key path the place (`file:line` or override) it was written at."""

    file: str
    overrides: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Return where `path` was written, or the innermost section around it that was; the file if none was."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.file)

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """Make the error that says `message` about `path`."""
        return RecipeError(": ".join([self.place(path), *([dotted(path)] if path else []), message]))

    def unknown(self, path: KeyPath, message: str) -> RecipeError:
        """Make the error that says `message` about the key `path`, which no recipe has, or none has any more."""
        return RecipeError(str(self.error(path, message)), path)

    def without(self, path: KeyPath) -> bool:
        """Remove the value at `path`; return whether there was one."""
        container: Any = self.data
        for key in path[:-1]:
            container = container[key]
        return container.pop(path[-1], self) is not self

    def with_folder(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Replace `{recipe_dir}` in `data_dir` by the folder of the recipe: relative if it is in the current one."""
        if not isinstance(keys.get("data_dir"), str):
            return keys
        folder = Path(self.file).absolute().parent
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        return {**keys, "data_dir": keys["data_dir"].replace("{recipe_dir}", str(folder))}

    def with_code(self, name: str) -> str:
        """Return the name of a user's code with the path of its file, if it has one, from the recipe's folder."""
        return locate_file(name, Path(self.file).parent)

    def restate(self, error: Exception, path: KeyPath = ()) -> RecipeError:
        """Put the place in front of an error of a config class, whose message starts with the key's dotted path.

        `path` is the section being built; it locates messages that name less than the section.
        """
        named = re.match(r"[A-Za-z_]\w*(\.\w+)*(?=: )", str(error))
        key = split_path(named[0]) if named else ()
        if not key or (key[0] not in self.data and key[:1] != path[:1]):
            return RecipeError(f"{self._places_of(path)}: {dotted(path) or 'recipe'}: {error}")
        return RecipeError(f"{self._places_of(path if path[: len(key)] == key else key)}: {error}")

    def _places_of(self, path: KeyPath) -> str:
        """Return the place of a section and of the overrides inside it, any of which may be wrong."""
        places = [self.place(path), *(place for p, place in self.places.items() if p[: len(path)] == path)]
        overrides = dict.fromkeys(p for p in places[1:] if p.startswith("override ") and p != places[0])
        return " with ".join([places[0], *overrides])


def dotted(path: KeyPath) -> str:
    """Write `("ppo", "rewards", 0)` as `ppo.rewards.0`."""
    return ".".join(map(str, path))


def split_path(text: str) -> KeyPath:
    """Read `ppo.rewards.0` as `("ppo", "rewards", 0)`."""
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in text.split("."))
