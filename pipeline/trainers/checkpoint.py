"""PPO checkpoints: written beside, then renamed, so that a directory with the final name is complete."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE = "trainer_state.json", "trainable.safetensors", "optimizer.pt"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class TrainerState:
    """How far a run is. All randomness follows from the seed and `step`, so there is no generator state to keep."""

    step: int = 0
    best_step: int = 0
    best_metric: float | None = None
    skipped_steps: int = 0
    kl_coef: float | None = None  # where it adapts; None: still the setting
    score_count: float = 0.0  # moments of the scores that were scaled by them
    score_mean: float = 0.0
    score_squares: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on: trained weights, optimizer and scheduler, and how far it is."""

    state: TrainerState
    weights: dict[str, Tensor]
    optimizer: dict
    scheduler: dict


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int, protect: int | None = None) -> Path:
    """Write `directory/checkpoint-<step>` and remove all but the newest `keep` and the one of step `protect`."""
    final = directory / f"{PREFIX}{checkpoint.state.step}"
    temporary = directory / f"tmp-{PREFIX}{checkpoint.state.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(checkpoint.weights, temporary / WEIGHTS_FILE)
    torch.save({"optimizer": checkpoint.optimizer, "scheduler": checkpoint.scheduler}, temporary / OPTIMIZER_FILE)
    (temporary / STATE_FILE).write_text(json.dumps(asdict(checkpoint.state), indent=2))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in list_checkpoints(directory)[:-keep]:
        if protect is None or old.name != f"{PREFIX}{protect}":
            shutil.rmtree(old)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        ValueError: a file is missing from it.
    """
    missing = [name for name in (STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE) if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {str(path)!r} lacks {', '.join(missing)}: remove it to start from the one before"
        )
    optimization = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    return Checkpoint(
        TrainerState(**json.loads((path / STATE_FILE).read_text())),
        load_file(path / WEIGHTS_FILE),
        optimization["optimizer"],
        optimization["scheduler"],
    )
