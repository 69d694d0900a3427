"""What the tests of stages share."""

import pytest
from demo_run import write_demo


@pytest.fixture(autouse=True)
def demo(tmp_path, monkeypatch):
    """Each test in a directory of its own with a recipe and its data."""
    monkeypatch.chdir(tmp_path)
    write_demo()
