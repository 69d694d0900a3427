"""Files: written whole or not at all, flushed to disk, and identified by a checksum."""

import hashlib
import os
from pathlib import Path


def sha256(path: Path) -> str:
    """Read a file and return its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; a process that is killed meanwhile leaves the old file, never half of the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def flush_to_disk(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
