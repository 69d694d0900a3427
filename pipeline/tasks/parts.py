"""Read `train` and parts of it such as `train[:90%]`; parts that are used together share no row."""

import re
from collections.abc import Mapping
from itertools import combinations

from pipeline.tasks.tables import SourceTable
from pipeline.tasks.types import TaskError

PART = re.compile(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def check_part(expression: str, key: str) -> None:
    """Refuse what is neither `name` nor `name[from:to]`, each a row or a percentage."""
    if not PART.fullmatch(expression):
        raise TaskError(f"task.{key}: {expression!r} is not the name of a split or a part of one, such as train[:90%]")


def split_name(expression: str) -> str:
    """Return the name in `name[from:to]`."""
    return PART.fullmatch(expression)[1]


def row_bounds(expression: str, size: int) -> tuple[int, int]:
    """Return the first row of `name[from:to]`, and the row after the last, of a split of `size` rows.

    As in Python, a number below 0 counts from the end, and rows beyond the end are none.
    """
    ends = [_row(text, size) for text in PART.fullmatch(expression).groups()[1:]]
    start, stop, _ = slice(*ends).indices(size)
    return start, stop


def _row(text: str | None, size: int) -> int | None:
    if text is None or not text.endswith("%"):
        return None if text is None else int(text)
    return round(int(text[:-1]) * size / 100)


def select_part(table: SourceTable, key: str, expression: str, limit: int | None) -> SourceTable:
    """Return the rows of `name[from:to]`, at most the first `limit` of them; `key` is the recipe's.

    Raises:
        TaskError: there are none.
    """
    start, stop = row_bounds(expression, len(table.rows))
    if start >= stop:
        raise TaskError(f"task.{key}: {expression!r} is empty: {table.place} has {len(table.rows)} rows")
    return table.select(range(start, min(stop, start + (limit or stop))))


def check_disjoint(parts: Mapping[str, tuple[str, int]]) -> None:
    """Refuse parts that share a row; each key of the recipe has its expression and the size of that split.

    Raises:
        TaskError: naming the keys.
    """
    for a, b in combinations(parts, 2):
        (first, last), (start, stop) = row_bounds(*parts[a]), row_bounds(*parts[b])
        shared = min(last, stop) - max(first, start)
        if split_name(parts[a][0]) == split_name(parts[b][0]) and shared > 0:
            raise TaskError(
                f"task.{b}: {parts[b][0]!r} shares {shared} row{'s' * (shared > 1)} with task.{a}, {parts[a][0]!r}; "
                "name parts that do not overlap, such as train[:90%] and train[90%:]"
            )
