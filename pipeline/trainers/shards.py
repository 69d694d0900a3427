"""Tensors in safetensors files, of which each process writes and reads its slices, by torch.distributed.checkpoint.

The files say where in a tensor each slice begins. So any number of processes can read them, in slices or whole.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Size, Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    load,
    save,
)

from pipeline.models.slices import slice_here

FILE_BYTES = 2**28  # of a file, unless one slice is larger: a process holds two copies of what it writes to one
OPTIMIZER = "optimizer."  # begins the names of an optimizer's tensors, before the number of the weight and a key


def write_slices(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors to files: each process writes its slices, and the main one what every process holds whole.

    Every process calls it.

    Raises:
        OSError: one of the processes could not write; every process raises it.
    """
    numbers = _file_numbers(tensors)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    with _as_one_process():
        save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))


def read_slices(tensors: Mapping[str, Tensor], folder: Path, others: Sequence[str] = ()) -> None:
    """Overwrite what this process holds of tensors with what was written under their names.

    Every process calls it. Names that begin with one of `others` may be in the files and not in `tensors`.

    Raises:
        ValueError: names are missing or unknown, or a shape is another one.
    """
    saved = saved_sizes(folder).keys()
    unknown = {name for name in saved - tensors.keys() if not name.startswith(tuple(others))}
    if differing := sorted(unknown | (tensors.keys() - saved)):
        raise ValueError(f"the weights saved in {folder} differ from those of the model in {', '.join(differing[:3])}")
    _read(tensors, folder)


def saved_sizes(folder: Path) -> dict[str, Size]:
    """Return names and whole shapes of the tensors that were written to a folder.

    Raises:
        ValueError: a file is not what was written.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except SafetensorError as error:
        raise ValueError(
            f"a safetensors file in {folder} cannot be read: {error}; remove the checkpoint to start from the one "
            "before"
        ) from error
    return {name: tensor.size for name, tensor in metadata.state_dict_metadata.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer keeps of each weight, by name."""
    states = optimizer.state_dict()["state"]
    return {f"{OPTIMIZER}{n}.{key}": value for n, state in states.items() for key, value in state.items()}


def read_optimizer(optimizer: torch.optim.Optimizer, groups: Sequence[dict], folder: Path) -> None:
    """Put back what `optimizer_tensors` gave, and the groups of weights with their settings.

    Every process calls it.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    tensors: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for name, size in saved_sizes(folder).items():
        if name.startswith(OPTIMIZER):
            number, key = name.removeprefix(OPTIMIZER).split(".")
            tensors[name] = torch.zeros_like(weights[int(number)]) if size else torch.zeros(())
            states.setdefault(int(number), {})[key] = tensors[name]
    _read(tensors, folder)
    optimizer.load_state_dict({"state": states, "param_groups": list(groups)})


def _read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    with _as_one_process():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Distribute tensors over files, in their order, by the bytes of this process's slices."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for name, tensor in tensors.items():
        slice_size = slice_here(tensor).nbytes
        if size and size + slice_size > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + slice_size
    return numbers


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Raise on every process what the first one that failed has raised; one process alone is not warned about."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        error, _ = next(iter(failure.failures.values()))
        raise error from failure
