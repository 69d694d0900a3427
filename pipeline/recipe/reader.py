"""Recipe text and overrides -> plain mappings that remember where every value was written."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
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

from pipeline.recipe.document import Document, KeyPath, RecipeError, dotted, split_path
from pipeline.recipe.secrets import secret_in
from pipeline.runtime.messages import did_you_mean

MAX_DEPTH = 20
MAX_BYTES, MAX_VALUES = 2**20, 10_000  # of a file; of a recipe with its aliases written out
MAX_NUMBER = 2**63 - 1
_SECRET = (
    "a recipe is saved with its run, so keep tokens, keys and passwords out of it; what needs one reads it from "
    "the environment, such as HF_TOKEN"
)
# What YAML allows in no text, and what it allows in a quoted one by an escape.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

# The core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `no` and `1_000` are text, `1e-5` is not.
_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a recipe file and lay the overrides, each `section.key=value`, over it.

    Raises:
        RecipeError: no such file, not YAML 1.2, a tag, a duplicate key, or an override that fits nowhere.
    """
    document = Document(str(path), tuple(overrides))
    document.data = _parse(_read_text(Path(path)), document) or {}
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections such as model: and task:, found a list or value")
    if found := secret_in(document.data):
        path = tuple(key for key in found[0] if key != "")
        raise document.error(path, f"{found[1]}: {_SECRET}")
    for override in overrides:
        _apply(override, document)
    return document


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # not all of it: the path may be that of a device
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(str(path), map(str, sorted(path.parent.glob("*.yaml"))))
        raise RecipeError(f"{path}: no such recipe file{hint}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the path
        raise RecipeError(f"{path}: the recipe cannot be read ({error})") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes, which no recipe is; give a recipe file")
    if found := _FORBIDDEN.search(text):
        line, column = text.count("\n", 0, found.start()) + 1, found.start() - text.rfind("\n", 0, found.start())
        raise RecipeError(
            f"{path}:{line}:{column}: the control character U+{ord(found[0]):04X}, which YAML does not allow; remove "
            'it, or write it by an escape such as "\\e" in a quoted text'
        )
    return text


def _parse(text: str, document: Document, label: str | None = None, base: KeyPath = ()) -> Any:
    """The value of one YAML document; places are written for everything in it, `label` or else file and line."""
    try:
        events = YAML(typ="safe", pure=True).parse(text)
        return _Reader(events, document, label, base).read_document()
    except MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        place = label or f"{document.file}:{line}"
        raise RecipeError(f"{place}: not valid YAML: {error.problem}") from error
    except RecipeError:
        raise
    except Exception as error:  # YAMLError, and what the library lets through, as of an escape beyond Unicode
        problem = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{label or document.file}: not valid YAML: {problem}") from error


@dataclass
class _Reader:
    """Turns YAML events into plain values, so that a place is known for each and no tag can build an object."""

    events: Iterator[Event]
    document: Document
    label: str | None
    base: KeyPath
    anchors: dict[str, "_Anchor"] = field(default_factory=dict)
    count: int = 0  # of values so far, those behind aliases included

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
            anchor = self.anchors[event.anchor]
            self._count(anchor.size, len(path) + anchor.depth, path)
            return copy.deepcopy(anchor.value)  # an override of one must not change the other
        if event.tag is not None:
            raise self.document.error(path, f"tags are not allowed in a recipe, found {_short_tag(event.tag)}")
        before = self.count
        self._count(1, len(path), path)
        if isinstance(event, MappingStartEvent):
            value = self._mapping(path)
        elif isinstance(event, SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._scalar(event, path)
        if event.anchor is not None:
            self.anchors[event.anchor] = _Anchor(value, self.count - before, _depth(value))
        return value

    def _count(self, values: int, depth: int, path: KeyPath) -> None:
        """Refuse what is too deep or too large: aliases of aliases make billions of values of a few lines."""
        self.count += values
        if depth > MAX_DEPTH:
            raise self.document.error(path[:3], f"nested more than {MAX_DEPTH} levels deep")
        if self.count > MAX_VALUES:
            raise self.document.error(path[:3], f"more than {MAX_VALUES:,} values, those behind aliases counted")

    def _scalar(self, event: ScalarEvent, path: KeyPath) -> Any:
        if found := _SURROGATE.search(event.value):
            raise self.document.error(path, f"{found[0]!a} is half of a character, which no file can hold")
        try:
            return resolve_scalar(event.value) if event.style is None else event.value
        except ValueError as error:
            raise self.document.error(path, str(error)) from error

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.tag is not None:
                raise RecipeError(f"{self._place(event)}: {dotted(path) or 'recipe'}: a key must be plain text")
            where = f"{self._place(event)}: {dotted(path) or 'recipe'}"
            if event.style is None and not _is_text(event.value):
                raise RecipeError(f"{where}: a key must be text, found {event.value or 'none'}")
            if event.style is None and event.value == "<<":
                raise RecipeError(f"{where}: merge keys (<<) are no part of YAML 1.2; write out what they would add")
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


@dataclass(frozen=True)
class _Anchor:
    """A value that aliases stand for, how many values it is, and how many levels deep."""

    value: Any
    size: int
    depth: int


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, items), default=0) if isinstance(value, dict | list) else 0


def _is_text(scalar: str) -> bool:
    try:
        return isinstance(resolve_scalar(scalar), str)
    except ValueError:
        return False


def resolve_scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar in YAML 1.2's core schema.

    Raises:
        ValueError: a whole number beyond 64 bits.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _DECIMAL.fullmatch(text) or _PREFIXED.fullmatch(text):
        # Before it is converted: Python refuses decimal numbers of thousands of digits in words of its own.
        number = int(text, 0 if text[1:2] in ("o", "x") else 10) if len(text) <= 40 else math.inf
        if abs(number) > MAX_NUMBER:
            raise ValueError(f"whole numbers are at most {MAX_NUMBER} here, found one of {len(text)} digits")
        return number
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
    if found := secret_in({name: text}):  # before any message repeats it
        raise RecipeError(f"override {name.strip()!r}: {found[1]}: {_SECRET}")
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
    if found := secret_in({name: value}):
        raise RecipeError(f"override {name.strip()!r}: {found[1]}: {_SECRET}")
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
