"""What a command prints before its own first line: nothing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_library_speaks_before_the_plan(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "pipeline" / "run.py"),
        str(ROOT / "recipes" / "quickstart.yaml"),
        "--dry-run",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (0, "")
