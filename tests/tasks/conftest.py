"""A folder with a little data set in three files."""

import pytest
from column_data import ROWS, write_lines

from pipeline.tasks import SPLITS


@pytest.fixture
def folder(tmp_path):
    """train, validation and test.jsonl with 4, 3 and 2 rows of their own."""
    for split, (start, stop) in zip(SPLITS, ((0, 4), (4, 7), (7, 9)), strict=True):
        write_lines(tmp_path / f"{split}.jsonl", ROWS[start:stop])
    return tmp_path
