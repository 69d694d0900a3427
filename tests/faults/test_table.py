"""tests/faults/README.md: every test that it names exists, and the rows are those of the faults, in order."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d", line)
]


def test_rows_are_in_order_and_whole():
    numbers = [int(row[0]) for row in ROWS]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 37))
    assert all(len(row) == 4 and all(row) for row in ROWS)


def test_every_test_that_is_named_exists():
    named = [name for row in ROWS for name in re.findall(r"`([^`]+)`", row[3])]
    assert len(named) >= len(ROWS)
    for name in named:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
