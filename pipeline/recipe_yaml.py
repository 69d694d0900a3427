"""Recipe text and overrides -> plain mappings that remember where every value was written."""

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 20

# The core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `no` and `1_000` are text, `1e-5` is not.
_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one sentence with the place, the key, what was found and a fix."""


@dataclass
class Document:
    """Plain values of a recipe, and for each key path the place (`file:line` or override) it was written at."""

    file: str
    overrides: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where `path` was written, or the innermost section around it that was; the file if none was."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.file)

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """The error that says `message` about `path`."""
        return RecipeError(": ".join([self.place(path), *([dotted(path)] if path else []), message]))

    def restate(self, error: Exception, path: KeyPath = ()) -> RecipeError:
        """An error of a config class, whose message starts with the key's dotted path, with its place in front.

        `path` is the section being built: it locates messages that name less than that.
        """
        named = re.match(r"[A-Za-z_]\w*(\.\w+)*(?=: )", str(error))
        key = split_path(named[0]) if named else ()
        if not key or (key[0] not in self.data and key[:1] != path[:1]):
            return RecipeError(f"{self._places_of(path)}: {dotted(path) or 'recipe'}: {error}")
        return RecipeError(f"{self._places_of(path if path[: len(key)] == key else key)}: {error}")

    def _places_of(self, path: KeyPath) -> str:
        """The place of a section and of the overrides inside it, any of which may be what is wrong with it."""
        places = [self.place(path), *(place for p, place in self.places.items() if p[: len(path)] == path)]
        overrides = dict.fromkeys(p for p in places[1:] if p.startswith("override ") and p != places[0])
        return " with ".join([places[0], *overrides])


def dotted(path: KeyPath) -> str:
    """`("ppo", "rewards", 0)` as `ppo.rewards.0`."""
    return ".".join(map(str, path))


def split_path(text: str) -> KeyPath:
    """`ppo.rewards.0` as `("ppo", "rewards", 0)`."""
    return tuple(int(part) if part.isdecimal() else part for part in text.split("."))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a recipe file and lay the overrides, each `section.key=value`, over it.

    Raises:
        RecipeError: no such file, not YAML 1.2, a tag, a duplicate key, or an override that fits nowhere.
    """
    document = Document(str(path), tuple(overrides))
    document.data = _parse(_read_text(Path(path)), document) or {}
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections such as model: and task:, found a list or value")
    for override in overrides:
        _apply(override, document)
    return document


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path(".")
        there = {p.name: p for p in sorted(folder.glob("*.yaml"))}
        close = difflib.get_close_matches(path.name, there, n=1) or difflib.get_close_matches(path.stem, there, n=1)
        hint = f"; did you mean {str(there[close[0]])!r}?" if close else ""
        raise RecipeError(f"{path}: no such recipe file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error})") from error


def _parse(text: str, document: Document, label: str | None = None, base: KeyPath = ()) -> Any:
    """The value of one YAML document; places are written for everything in it, `label` or else file and line."""
    try:
        events = YAML(typ="safe", pure=True).parse(text)
        return _Reader(events, document, label, base).read_document()
    except MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        place = label or f"{document.file}:{line}"
        raise RecipeError(f"{place}: not valid YAML: {error.problem}") from error
    except YAMLError as error:
        raise RecipeError(f"{label or document.file}: not valid YAML: {' '.join(str(error).split())}") from error


@dataclass
class _Reader:
    """Turns YAML events into plain values, so that a place is known for each and no tag can build an object."""

    events: Iterator[Event]
    document: Document
    label: str | None
    base: KeyPath
    anchors: dict[str, Any] = field(default_factory=dict)

    def read_document(self) -> Any:
        value, documents = None, 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise RecipeError(f"{self._place(event)}: a recipe is one YAML document, found a second one")
                if event.version not in (None, (1, 2)):
                    raise RecipeError(f"{self._place(event)}: recipes are YAML 1.2; remove the %YAML line")
            elif isinstance(event, NodeEvent):
                value = self._value(event, self.base)
        return value

    def _place(self, event: Event) -> str:
        return self.label or f"{self.document.file}:{event.start_mark.line + 1}"

    def _value(self, event: NodeEvent, path: KeyPath) -> Any:
        if path:  # what is wrong with a recipe as a whole is in the file, not on its first line
            self.document.places[path] = self._place(event)
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise self.document.error(path, f"the alias *{event.anchor} stands before or inside its anchor")
            return copy.deepcopy(self.anchors[event.anchor])  # an override of one must not change the other
        if event.tag is not None:
            raise self.document.error(path, f"tags are not allowed in a recipe, found {_short_tag(event.tag)}")
        if len(path) > MAX_DEPTH:
            raise self.document.error(path[:3], f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, MappingStartEvent):
            value = self._mapping(path)
        elif isinstance(event, SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = resolve_scalar(event.value) if event.style is None else event.value
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.tag is not None:
                raise RecipeError(f"{self._place(event)}: {dotted(path) or 'recipe'}: a key must be plain text")
            if event.style is None and not isinstance(resolve_scalar(event.value), str):
                found = event.value or "none"
                where = f"{self._place(event)}: {dotted(path) or 'recipe'}"
                raise RecipeError(f"{where}: a key must be text, found {found}")
            key = (*path, event.value)
            if event.value in values:
                raise RecipeError(
                    f"{self._place(event)}: {dotted(key)}: duplicate key, first written at {self.document.places[key]}"
                )
            place = self._place(event)
            values[event.value] = self._value(next(self.events), key)
            self.document.places[key] = place
        return values

    def _sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values


def resolve_scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar in YAML 1.2's core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _INFINITE.fullmatch(text) else text


def _short_tag(tag: object) -> str:
    return str(tag).replace("tag:yaml.org,2002:", "!!")


def _apply(override: str, document: Document) -> None:
    """Write one `section.key=value` into the document.

    Raises:
        RecipeError: no `=`, an empty key, or a path through something that is no section or list.
    """
    label = f"override {override!r}"
    name, equals, text = override.partition("=")
    if not equals or not all(name.strip().split(".")):
        raise RecipeError(f"{label}: write an override as section.key=value, such as ppo.kl_coef=0.1")
    path = split_path(name.strip())
    container: Any = document.data
    for depth, key in enumerate(path[:-1]):
        if isinstance(container, dict) and container.get(str(key)) is None:
            container[str(key)] = {}
            document.places[path[: depth + 1]] = label
        container = _child(container, path[: depth + 1], label)
    _child(container, path, label, must_exist=False)
    for place in [p for p in document.places if p[: len(path)] == path]:
        del document.places[place]
    value = _parse(text, document, label, path)
    document.places[path] = label
    container[path[-1] if isinstance(container, list) else str(path[-1])] = value


def _child(container: Any, path: KeyPath, label: str, must_exist: bool = True) -> Any:
    """What `path`, whose parent is `container`, leads to."""
    key = path[-1]
    if isinstance(container, dict):
        return container[str(key)] if must_exist else None
    if not isinstance(container, list):
        raise RecipeError(
            f"{label}: {dotted(path[:-1])} is {container!r}, which has no keys; set it as a whole, "
            f"such as {dotted(path[:-1])}={{name: ...}}"
        )
    if not isinstance(key, int) or key >= len(container):
        raise RecipeError(
            f"{label}: {dotted(path[:-1])} is a list of {len(container)}, so its items are "
            f"{', '.join(dotted((*path[:-1], i)) for i in range(min(len(container), 3))) or 'none'}"
        )
    return container[key]
