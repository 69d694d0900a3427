"""Make prompt, completion and references from a row of data, by column names and templates."""

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

from datasets import ClassLabel, Features, List

from pipeline.runtime.messages import did_you_mean
from pipeline.tasks.known_shapes import task_keys
from pipeline.tasks.tables import SourceTable
from pipeline.tasks.text_rows import Row
from pipeline.tasks.types import TaskError, check_widths

Reader = tuple[str, str, Callable[[str, Row], Any]]  # key of the recipe, column or template, what reads it from a row

LONE_FIELD = re.compile(r"\s*\{([^{}!:]+)\}\s*")
# How a list of messages begins where a table holds it as a text: JSON, or what Python prints.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


class Unusable(ValueError):
    """A row gives no example; the message says why."""


def placeholders(expression: str, key: str) -> list[str]:
    """Return the `{fields}` of a template; none where `expression` is the name of a column.

    Raises:
        TaskError: a stray brace, or a field without a name.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(expression) if name is not None]
    except ValueError as error:
        raise TaskError(
            f"task.{key}: the template {expression!r} is not valid ({error}); write {{{{ for a brace"
        ) from error
    check_widths(expression, f"task.{key}")
    if not expression.strip() or not all(map(column_of, names)):
        raise TaskError(f"task.{key}: {expression!r} names no column; write its name, or a text with {{column}} in it")
    return names


def column_of(field: str) -> str:
    """Return `answers` of `answers[text][0]`."""
    return re.split(r"[.\[]", field, maxsplit=1)[0]


def check_columns(
    table: SourceTable,
    key: str,
    expression: str,
    keys_of: Callable[[Sequence[str]], str | None] = task_keys,
) -> None:
    """Refuse an expression with a column that the data does not have; `keys_of` says which keys would read them.

    Raises:
        TaskError: naming it, those that there are, and the keys for rows of a well-known shape.
    """
    columns = table.dataset.column_names
    for column in list(map(column_of, placeholders(expression, key))) or [expression]:
        if column not in columns:
            hint = did_you_mean(column, columns) or ";"
            keys = keys_of(columns)
            shape = f"; rows like these are read by {keys}" if keys else ""
            there = f"there are: {', '.join(columns)}{shape}"
            raise TaskError(f"task.{key}: no column {column!r} in {table.place}{hint} {there}")


def labels_of(features: Features) -> dict[str, Any]:
    """Return the features of the columns that hold labels, or lists or mappings with labels."""
    return {column: feature for column, feature in features.items() if "ClassLabel" in str(feature)}


def with_label_names(row: Row, labels: Mapping[str, Any]) -> Row:
    """Return a row with the names of its labels, which are numbers in a table; a label that is missing is null."""
    return row | {column: _label_names(row[column], feature) for column, feature in labels.items()}


def _label_names(value: Any, feature: Any) -> Any:
    if isinstance(feature, ClassLabel):
        return None if value is None or value < 0 else feature.int2str(value)
    if isinstance(feature, List) and isinstance(value, list):
        return [_label_names(item, feature.feature) for item in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _label_names(item, feature[key]) for key, item in value.items()}
    return value


def read_row(readers: Sequence[Reader], row: Row) -> tuple[list[Any], str | None]:
    """Return what each reader makes of a row, and None; or why the row gives no example."""
    values = []
    for key, expression, read in readers:
        try:
            values.append(read(expression, row))
        except Unusable as reason:
            return [], f"task.{key}: {reason}"
    return values, None


def leave_out(table: SourceTable, problems: Sequence[str | None], skip: bool) -> tuple[SourceTable, list[int]]:
    """Return the table without the rows that have a problem, and the indices that are left.

    Raises:
        TaskError: every row has one, or `skip` is False and some have: why, and where the first three are.
    """
    reasons = {index: problem for index, problem in enumerate(problems) if problem is not None}
    if not reasons:
        return table, list(range(len(problems)))
    if not skip:
        reason = next(iter(reasons.values()))
        raise TaskError(f"{reason}, in {table.where([index for index in reasons if reasons[index] == reason])}")
    if len(reasons) == len(problems):
        raise TaskError(f"{reasons[0]}, in {table.where(list(reasons))}, so every row is broken")
    return table.without(reasons), [index for index in range(len(problems)) if index not in reasons]


def read_text(expression: str, row: Row) -> str:
    """Return the text in the column `expression`, or the template filled with texts and numbers of the row.

    A line of a template that is one field alone is left out where the field has no value, unless no field has one.

    Raises:
        Unusable: a value is null or missing, of another type, or a list of chat messages written as text.
    """
    expression = _without_empty_lines(expression, row)
    names = placeholders(expression, "prompt")
    if not names:
        value = row.get(expression)
        if isinstance(value, int | float):
            raise Unusable(f"the column {expression!r} holds {_kind(value)}, not a text; write '{{{expression}}}'")
        if isinstance(value, dict) and value:
            key = "text" if "text" in value else next(iter(value))
            raise Unusable(
                f"the column {expression!r} holds a mapping of {', '.join(value)}; write '{{{expression}[{key}]}}'"
            )
        text = require_text(value, f"the column {expression!r}")
        if MESSAGES.match(text):
            raise messages_as_text(expression)
        return text
    for name in names:
        _text_or_number(_field(name, row), f"{{{name}}}")
    try:
        return expression.format(**{column: _with_whole_numbers(row[column]) for column in map(column_of, names)})
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise Unusable(f"the template {expression!r} cannot be filled ({error})") from error


def _with_whole_numbers(value: Any) -> Any:
    """Return a value whose whole numbers are of type int: a table makes 18.0 of an 18 that is beside a 2.5."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    return [_with_whole_numbers(item) for item in value] if isinstance(value, list) else value


def messages_as_text(column: str) -> Unusable:
    """Return the refusal of a column in which a list of chat messages stands as a text."""
    return Unusable(
        f"the column {column!r} holds a list of messages written as text, expected the list itself; write the "
        "rows into a .jsonl file (a CSV value is always a text) with json.loads of this column, or ast.literal_eval "
        "where its quotes are single"
    )


def _without_empty_lines(template: str, row: Row) -> str:
    """Return a template without the lines that are a field alone and would be empty."""
    lines = template.split("\n")
    if len(lines) == 1:
        return template
    kept = [line for line in lines if not ((field := LONE_FIELD.fullmatch(line)) and _is_empty(field[1], row))]
    return "\n".join(kept) if len(kept) < len(lines) and any("{" in line for line in kept) else template


def _is_empty(name: str, row: Row) -> bool:
    try:
        value = _field(name, row)
    except Unusable:
        return True
    return value is None or (isinstance(value, str) and not value.strip())


def read_prompt(expression: str, row: Row) -> str:
    """Read a text as `read_text` does, and refuse white space alone: a prompt needs a token to be continued from."""
    text = read_text(expression, row)
    if not text.strip():
        raise Unusable("the prompt is blank")
    return text


def read_references(expression: str, row: Row) -> list[str]:
    """Return the texts of a column or of one `{field}`, which holds a text or a list of texts; or the filled template.

    Raises:
        Unusable: as `read_text`, or an empty list.
    """
    names = placeholders(expression, "references")
    if names and expression != f"{{{names[0]}}}":
        return [read_text(expression, row)]
    value = _field(names[0], row) if names else row.get(expression)
    if not isinstance(value, list):
        return [read_text(expression, row)]
    name = expression if names else f"the column {expression!r}"
    if not value:
        raise Unusable(f"{name} is an empty list, expected at least one text")
    return [require_text(item, f"the list in {name}") for item in value]


def _field(name: str, row: Row) -> Any:
    outer = re.fullmatch(r"(.+)(?:\[[^\[]*\]|\.[^.\[]*)", name)
    if outer and isinstance(_field(outer[1], row), str):
        raise Unusable(f"{{{name}}} reaches into a text")  # {answer[0]} would be its first letter
    try:
        return Formatter().get_field(name, (), row)[0]
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise Unusable(f"{{{name}}} is missing") from error


def require_text(value: object, name: str) -> str:
    """Return a value that is a text.

    Raises:
        Unusable: it is something else; `name` says what it is.
    """
    if not isinstance(value, str):
        raise Unusable(f"{name} {describe_value(value)}, expected a text")
    return value


def _text_or_number(value: object, name: str) -> None:
    if not isinstance(value, str | int | float):
        raise Unusable(f"{name} {describe_value(value)}, expected a text or a number")


def describe_value(value: object) -> str:
    """Return what a value is, in words that follow its name."""
    return "is null or missing" if value is None else f"holds {_kind(value)}"


def _kind(value: object) -> str:
    kinds = {str: "a text", bool: "true or false", list: "a list", dict: "a mapping"}
    other = "a number" if isinstance(value, int | float) else f"a value of type {type(value).__name__}"
    return kinds.get(type(value), other)
