"""Random numbers: one way to derive a seed from another, and the generators' states as values that load safely."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from accelerate import PartialState


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Derive the seed of one use from the run's seed: the same for the same arguments, unrelated to any other.

    `purpose` names the use, which always gives the same count of `numbers` (a step, a rank), none of them negative.
    Returns a number of 63 bits, which torch and numpy take.
    """
    words = (seed, int.from_bytes(purpose.encode()), *numbers)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keep_random_state(enabled: bool = True) -> AbstractContextManager:
    """Put the states of torch's generators back after a block: that of the CPU, and of the GPU of this process.

    Left alone, torch keeps those of every GPU that the process sees, and warns of it.
    """
    devices = [torch.cuda.current_device()] if enabled and torch.cuda.is_available() else []
    return torch.random.fork_rng(devices, enabled)


def random_state() -> dict[str, object]:
    """States of python's, numpy's and torch's generators, those of accelerators included, as values for JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [device.tolist() for device in torch.cuda.get_rng_state_all()]
    return state


def restore_random_state(state: dict[str, object]) -> None:
    """Put back what `random_state` gave, also after a way through JSON, which turns tuples into lists."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        for device in range(min(torch.cuda.device_count(), len(state["cuda"]))):  # there may be fewer than before
            torch.cuda.set_rng_state(torch.as_tensor(state["cuda"][device], dtype=torch.uint8), device)


def of_this_process(states: Sequence, source: object):
    """The entry of this process.

    Raises:
        ValueError: the run that made `source` had another number of processes.
    """
    processes = PartialState()
    if len(states) != processes.num_processes:
        raise ValueError(
            f"{source} was made by {len(states)} processes and this run has {processes.num_processes}: start as many "
            "again, or remove the stage's directory to begin anew"
        )
    return states[processes.process_index]
