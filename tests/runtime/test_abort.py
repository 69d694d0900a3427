"""What a process that fails leaves for the launcher."""

import json
import os

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeline.runtime.abort import record_failure


def test_a_record_is_whole_or_not_there(tmp_path, monkeypatch):
    """A signal ends the process while it writes: torch's agent reads what is there, and stops at half a record."""
    file = tmp_path / "error"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def ended(*args, **kwargs):
        raise SystemExit(143)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, ended)
    monkeypatch.setattr(json, "dump", ended)
    with pytest.raises(SystemExit):
        record_failure("no room")
    assert not file.exists()
    assert ProcessFailure(0, 1, -15, str(file)).error_file_data["message"] == "<NONE>"
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    record_failure("no room")
    assert ProcessFailure(0, 1, 1, str(file)).error_file_data["message"]["message"] == "no room"
