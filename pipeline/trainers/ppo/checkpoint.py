"""What a PPO checkpoint holds, and how it is written and read; nothing in one is executed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.trainers.checkpoints import keep_newest, load_tensors, new_checkpoint, require_finite, require_intact

STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE = "trainer_state.json", "trainable.safetensors", "optimizer.pt"
RANDOM_FILE = "random_state.pt"


@dataclass(frozen=True)
class TrainerState:
    """How far a run is. Prompts, sampling and mini-batches follow from the seed and `step`."""

    step: int = 0
    episodes: int = 0  # of all processes; another number of them makes other steps
    best_step: int = 0
    best_metric: float | None = None
    skipped_steps: int = 0
    skipped_in_row: int = 0  # of them, those that end with the last optimizer step
    micro_batch_size: int | None = None  # where memory has run out; None: still the setting
    kl_coef: float | None = None  # where it adapts; None: still the setting
    score_count: float = 0.0  # moments of the scores that were scaled by them
    score_mean: float = 0.0
    score_squares: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on: trained weights, optimizer and scheduler, and how far it is.

    `random` holds the generators' states of each process: a reward function may draw from them.
    """

    state: TrainerState
    weights: dict[str, Tensor]
    optimizer: dict
    scheduler: dict
    random: Sequence[dict[str, object]]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int, protect: int | None = None) -> Path:
    """Write `directory/checkpoint-<step>` and remove all but the newest `keep` and the one of step `protect`.

    Every process calls it, the main one writes.

    Raises:
        FloatingPointError: a weight is not finite.
        OSError: the disk is full.
    """
    step = checkpoint.state.step
    require_finite(checkpoint.weights, step)
    with new_checkpoint(directory, step, state_size(checkpoint.weights)) as folder:
        if PartialState().is_main_process:
            save_file(checkpoint.weights, folder / WEIGHTS_FILE)
            optimization = {"optimizer": checkpoint.optimizer, "scheduler": checkpoint.scheduler}
            torch.save(optimization, folder / OPTIMIZER_FILE)
            torch.save(list(checkpoint.random), folder / RANDOM_FILE)
            (folder / STATE_FILE).write_text(json.dumps(asdict(checkpoint.state), indent=2))
    keep_newest(directory, keep, protect)
    return directory / f"checkpoint-{step}"


def state_size(weights: dict[str, Tensor]) -> int:
    """About how many bytes a checkpoint takes: the trained weights and AdamW's two moments of each."""
    return 3 * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        ValueError: a file is missing, or not what was saved; a field of the state is missing or unknown.
    """
    require_intact(path)
    optimization = load_tensors(path / OPTIMIZER_FILE)
    return Checkpoint(
        _load_state(path / STATE_FILE),
        load_file(path / WEIGHTS_FILE),
        optimization["optimizer"],
        optimization["scheduler"],
        load_tensors(path / RANDOM_FILE),
    )


def _load_state(file: Path) -> TrainerState:
    values, names = json.loads(file.read_text()), {field.name for field in fields(TrainerState)}
    if values.keys() != names:
        missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
        raise ValueError(
            f"{file} was made by another version: missing {', '.join(missing) or 'nothing'}, unknown "
            f"{', '.join(unknown) or 'nothing'}; go on with that version, or remove the stage's directory"
        )
    return TrainerState(**values)
