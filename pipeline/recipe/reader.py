"""Recipe text and overrides -> plain values that remember where each was written: YAML 1.2, composed by ruamel."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from pipeline.recipe.document import Document, KeyPath, RecipeError, dotted, split_path
from pipeline.recipe.text_keys import is_text_key
from pipeline.runtime.messages import did_you_mean, environment_secrets, redact

MAX_BYTES = 2**20
# Of a recipe with its aliases written out: aliases of aliases make billions of values of a few lines.
MAX_DEPTH, MAX_VALUES = 20, 10_000
MAX_NUMBER = 2**63 - 1
# What ruamel calls the values that it recognises without a tag; the last three are text in YAML 1.2.
KINDS = ("map", "seq", "str", "null", "bool", "int", "float", "timestamp", "value", "merge")
NULLS = ("", "~", "null", "Null", "NULL")
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'', re.DOTALL)
BASES = {"0x": 16, "0o": 8, "0b": 2}


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
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # not all of it: the path may be that of a device
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        hint = did_you_mean(str(path), map(str, sorted(path.parent.glob("*.yaml"))))
        raise RecipeError(f"{path}: no such recipe file{hint}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the path
        raise RecipeError(f"{path}: the recipe cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes, which no recipe is; give a recipe file")
    return text


def _parse(text: str, document: Document, override: str | None = None, path: KeyPath = ()) -> Any:
    """Return the value of a YAML document, and note for everything in it the override, or the file and line."""
    line = None
    try:
        if directive := re.search("^%YAML", text, re.MULTILINE):
            line = text.count("\n", 0, directive.start()) + 1
            raise ValueError("recipes are YAML 1.2; remove the %YAML line")
        node = YAML(typ="rt").compose(text)
        return None if node is None else _Converter(document, override).value(node, path)
    except RecipeError:
        raise
    except MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f'the control character U+{error.character:04X}; write an escape for it, as "\\e" in a quoted text'
    except RecursionError:
        problem = f"nested more than {MAX_DEPTH} levels deep"
    except Exception as error:  # ruamel lets errors of Python through, as of an escape beyond Unicode
        problem = str(error)
    place = override or (f"{document.file}:{line}" if line else document.file)
    raise RecipeError(f"{place}: not valid YAML: {problem}")


@dataclass
class _Converter:
    """Turns ruamel's nodes into plain values and notes where each was written; no tag can build an object."""

    document: Document
    override: str | None
    secrets: list[str] = field(default_factory=environment_secrets)
    count: int = 0  # of values so far, those behind aliases included

    def value(self, node: Node, path: KeyPath) -> Any:
        """Return the plain value of a node; each alias of it gets a value of its own, which overrides may change."""
        if path:
            self.document.places.setdefault(path, self._place(node))
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if node.ctag.handle is not None or kind not in KINDS:
            tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
            raise self.document.error(path, f"tags are not allowed in a recipe, found {tag}")
        self.count += 1
        if len(path) > MAX_DEPTH:
            raise self.document.error(path[:3], f"nested more than {MAX_DEPTH} levels deep")
        if self.count > MAX_VALUES:
            raise self.document.error(path[:3], f"more than {MAX_VALUES:,} values, those behind aliases counted")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(kind, node.value, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place, key = self._place(key_node), key_node.value
            if not isinstance(key_node, ScalarNode) or not str(key_node.tag).endswith(":str"):
                shown = (key or "none") if isinstance(key_node, ScalarNode) else "a list or mapping"
                raise RecipeError(f"{place}: {dotted(path) or 'recipe'}: a key must be text, found {shown}")
            if key in values:
                first = self.document.places[(*path, key)]
                raise RecipeError(f"{place}: {dotted((*path, key))}: duplicate key, first written at {first}")
            self.document.places[(*path, key)] = place
            values[self._scalar("str", key, (*path, key))] = self.value(value_node, (*path, key))
        return values

    def text(self, text: str, path: KeyPath) -> str:
        """Return a text, if a recipe may hold it."""
        if any(secret in text for secret in self.secrets):
            raise self.document.error(
                path,
                "it holds a secret of the environment, and a recipe is saved with its run; what needs a secret reads "
                "it from the environment",
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.document.error(path, f"{text!a} has half of a character, which no file can hold")
        return text

    def _scalar(self, kind: str, text: str, path: KeyPath) -> Any:
        text = self.text(text, path)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind not in ("int", "float") or "_" in text:  # 1_000 is text in YAML 1.2
            return text
        sign, digits = ("-" if text.startswith("-") else "", text.lstrip("+-").lower())
        if kind == "float":
            number = float(sign + digits.replace(".inf", "inf").replace(".nan", "nan"))
        else:  # Python converts no decimal number of thousands of digits
            number = int(sign + digits, BASES.get(digits[:2], 10)) if len(digits) <= 64 else math.inf
            if abs(number) > MAX_NUMBER:
                problem = f"whole numbers are at most {MAX_NUMBER} here, found one of {len(digits)} digits"
                raise self.document.error(path, problem)
        if math.isnan(number):
            raise self.document.error(path, "expected a number, found nan")
        return number

    def _place(self, node: Node) -> str:
        return self.override or f"{self.document.file}:{node.start_mark.line + 1}"


def _apply(override: str, document: Document) -> None:
    """Write one `section.key=value` into the document.

    Raises:
        RecipeError: no `=`, an empty key, or a path through something that is no section or list.
    """
    label = f"override {redact(override)!r}"
    name, equals, text = override.partition("=")
    if not equals or not all(name.strip().split(".")):
        raise RecipeError(f"{label}: write an override as section.key=value, such as ppo.kl_coef=0.1")
    path, container = split_path(name.strip()), document.data
    for depth, key in enumerate(path):
        outer = dotted(path[:depth])
        if isinstance(container, list):
            if not isinstance(key, int) or key >= len(container):
                items = ", ".join(f"{outer}.{index}" for index in range(min(len(container), 3))) or "none"
                raise RecipeError(f"{label}: {outer} is a list of {len(container)}, so its items are {items}")
        elif isinstance(container, dict):
            key = str(key)
        else:
            example = f"{outer}={{name: ...}}"
            raise RecipeError(f"{label}: {outer} is {container!r}, which has no keys; set it as a whole: {example}")
        if depth == len(path) - 1:
            break
        if isinstance(container, dict) and container.get(key) is None:
            container[key] = {}
            document.places[path[: depth + 1]] = label
        container = container[key]
    document.places = {place: where for place, where in document.places.items() if place[: len(path)] != path}
    container[key] = _override_value(text, document, label, path)
    document.places[path] = label


def _override_value(text: str, document: Document, label: str, path: KeyPath) -> Any:
    """Return the value of an override: for a key that holds text the text as written, without quotes around it.

    So `task.prompt=translate English to French: {source}` needs no quotes, which YAML would.
    """
    plain = text.strip()
    as_yaml = plain in NULLS or QUOTED.fullmatch(plain) or not all(c.isprintable() or c in "\n\t" for c in plain)
    if as_yaml or not is_text_key(path, document):
        return _parse(text, document, label, path)
    document.places[path] = label
    return _Converter(document, label).text(plain, path)
