"""Checkpoint directories: written under another name, checksummed, renamed; damaged ones are named and skipped."""

import errno
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from pipeline.models.slices import slice_here
from pipeline.runtime.distributed import gather_rows, launched_engine, on_main
from pipeline.runtime.files import flush_to_disk, sha256

PREFIX, TEMPORARY, DAMAGED = "checkpoint-", "tmp-", "damaged-"
MANIFEST = "manifest.json"
FULL_DISK = 2**20  # bytes: with fewer left, a write that failed has failed for want of room


@contextmanager
def new_checkpoint(directory: Path, step: int, size: int) -> Iterator[Path]:
    """Open a folder of about `size` bytes that becomes `directory/checkpoint-<step>`; every process enters and leaves.

    The name `checkpoint-<step>` appears when the block ends well: its files are complete, on disk, and listed with
    their SHA-256 in manifest.json. Until then whatever was there before stays.

    Raises:
        OSError: the disk is full; what was written is removed.
    """
    final, processes = directory / f"{PREFIX}{step}", PartialState()
    temporary = directory / f"{TEMPORARY}{final.name}"
    try:
        if processes.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        processes.wait_for_everyone()
        yield temporary
        processes.wait_for_everyone()
        _commit(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = _free(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        after = _free(directory)
        says_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not says_full and free >= FULL_DISK and after >= size:
            raise
        raise OSError(
            f"cannot write {final}: it needs about {size:,} bytes and {after:,} are free; the checkpoints before it "
            "are intact: make room and run the same command again"
        ) from error
    processes.wait_for_everyone()


def _free(directory: Path) -> int:
    """Return the bytes free where a directory is, or will be made."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _commit(temporary: Path, final: Path) -> None:
    names = on_main(lambda: sorted(str(f.relative_to(temporary)) for f in temporary.rglob("*") if f.is_file()))
    manifest = dict(zip(names, _describe(temporary, names), strict=True))
    if not PartialState().is_main_process:
        return
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    files = [temporary / name for name in names]
    folders = sorted({path.parent for path in files} | {temporary})
    for path in [*files, temporary / MANIFEST, *folders]:
        flush_to_disk(path)
    if final.exists():
        discard(final)
    temporary.rename(final)
    flush_to_disk(final.parent)


def _describe(folder: Path, names: Sequence[str]) -> list[dict[str, object]]:
    """Return size and checksum of each file; every process reads its share of them."""
    files = [folder / name for name in names]
    return gather_rows(
        [[row] for row in range(len(files))],
        lambda rows: [{"bytes": files[row].stat().st_size, "sha256": sha256(files[row])} for row in rows],
    )


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; killed half-way, what is left of it does not look like one."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    checkpoints = [path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix(PREFIX)))


def keep_newest(directory: Path, keep: int | None, protect: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of step `protect`; None keeps all."""
    if keep is not None and PartialState().is_main_process:
        for old in list_checkpoints(directory)[:-keep]:
            if old.name != f"{PREFIX}{protect}":
                discard(old)


def clear_checkpoints(directory: Path) -> None:
    """Remove what an earlier run left: its higher steps would outlive the new ones."""
    if PartialState().is_main_process:
        for old in list_checkpoints(directory):
            discard(old)
    PartialState().wait_for_everyone()


def check_checkpoint(path: Path) -> str | None:
    """Return what is wrong with the contents of a checkpoint by its manifest, or None.

    Every process calls it, and reads its share of the files.

    Raises:
        ValueError: files are missing, or weights were added. Someone did that: a kill or a full disk does not.
    """
    manifest = on_main(lambda: _read_manifest(path))
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    for name, actual in zip(manifest, _describe(path, list(manifest)), strict=True):
        size, expected = actual["bytes"], manifest[name]["bytes"]
        if size != expected:
            return f"{name} has {size:,} bytes instead of {expected:,}"
        if actual["sha256"] != manifest[name]["sha256"]:
            return f"{name} does not have the checksum it was saved with"
    return None


def _read_manifest(path: Path) -> dict[str, dict] | None:
    """Read size and checksum of each file as they were saved; None where the manifest is broken.

    Raises:
        ValueError: files are missing, or there are weights that were not saved with the others and would be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text()) if (path / MANIFEST).is_file() else {MANIFEST: {}}
    except json.JSONDecodeError:
        return None
    if missing := [name for name in manifest if not (path / name).is_file()]:
        raise ValueError(
            f"checkpoint {str(path)!r} lacks {', '.join(missing)}: put back what is missing, or remove the checkpoint "
            "to start from the one before; to start from weights alone, begin a new run with ppo.sft_model_path"
        )
    others = sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors"))
    if strange := [name for name in others if name not in manifest]:
        raise ValueError(
            f"checkpoint {str(path)!r} holds {', '.join(strange)}, which {MANIFEST} does not list: its weights would "
            "be read with the others; remove it from there"
        )
    return manifest


def require_intact(path: Path) -> None:
    """Refuse a checkpoint that is not what was saved; every process calls it.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} is gone: put it back, or remove the later ones to make it again")
    if problem := check_checkpoint(path):
        raise ValueError(
            f"checkpoint {str(path)!r} is damaged: {problem}; remove it and those after it to make it again"
        )


def newest_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, and a sentence on each newer one; every process calls it.

    Damaged ones are renamed to `damaged-...`, and what a kill left of unfinished saves is removed.

    Raises:
        ValueError: as `check_checkpoint`, or there are checkpoints and all are damaged.
    """
    notes: list[str] = []
    for path in on_main(lambda: _finished_checkpoints(directory))[::-1]:
        problem = check_checkpoint(path)
        if problem is None:
            return path, notes
        notes.append(on_main(partial(_set_aside, path, problem)))
    if notes:
        raise ValueError(f"no intact checkpoint in {directory}: {'; '.join(notes)}; run again to start anew")
    return None, notes


def _finished_checkpoints(directory: Path) -> list[Path]:
    """Remove what a kill left of unfinished saves; return the checkpoints, oldest first."""
    for unfinished in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(unfinished)
    return list_checkpoints(directory)


def _set_aside(path: Path, problem: str) -> str:
    aside = path.with_name(f"{DAMAGED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return f"{path} is damaged and not used: {problem}; it is now {aside.name}"


def check_space(directory: Path, size: int, count: int) -> None:
    """Refuse to start where `count` checkpoints of `size` bytes do not fit, those already there included.

    Raises:
        OSError: naming the directory, the bytes needed and those free.
    """
    needed = size * max(0, count - len(list_checkpoints(directory)))
    free = _free(directory)
    if free < needed:
        raise OSError(
            f"no room for the checkpoints in {directory}: {count} of about {size:,} bytes need {needed:,} bytes and "
            f"{free:,} are free; make room, or lower save_total_limit"
        )


def require_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse to save weights that are NaN or infinite; every process calls it and looks at its slices.

    Raises:
        FloatingPointError: naming the step and the first such weight, on every process.
    """
    here = (name for name, tensor in tensors.items() if not torch.isfinite(slice_here(tensor)).all())
    if broken := [name for name in gather_object([next(here, None)]) if name]:
        raise FloatingPointError(
            f"step {step}: {broken[0]} is not finite, nothing is saved; start again with a lower learning_rate"
        )


def load_tensors(file: Path):
    """Load what `torch.save` wrote, if it is made of tensors and plain values alone.

    Raises:
        ValueError: it holds anything else, which could run code.
    """
    with tensors_alone(file):
        mapped = launched_engine() == "FSDP"  # each process takes its slices of what a machine reads once
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def tensors_alone(file: object) -> Iterator[None]:
    """Turn torch's refusal to unpickle an object into one sentence.

    Raises:
        ValueError: naming `file`.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values, which could run code: it is not loaded; remove the "
            "checkpoint to start from the one before"
        ) from error
