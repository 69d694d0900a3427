"""Memory of this process: how much it held, and smaller batches with the same result where it runs out."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Result = TypeVar("Result")
# What accelerate does not look for: allocators of CPUs on other systems, messages without a full stop, and libraries
# of a GPU that find no room for what they work in.
MORE_WORDS = ("not enough memory", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
MORE_WORDS += ("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED")
_CLEARED: list[Callable[[], None]] = []


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that no memory is left, on an accelerator or on the machine itself."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in MORE_WORDS)


def in_smaller_batches(call: Callable[[int], Result], size: int) -> tuple[Result, int]:
    """Call `call(size)`, again with half the size whenever memory runs out; return the result and the size it took.

    Raises:
        RuntimeError: of the last call, if even single rows do not fit.
    """
    while True:
        try:
            return call(size), size
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if size == 1 or not is_out_of_memory(error):
                raise
        # After the block: there the traceback no longer holds the tensors of the pass that failed.
        size = (size + 1) // 2
        free_memory()


class BatchSize:
    """How many rows are computed at once: `initial`, and half as many from where memory runs out."""

    def __init__(self, initial: int) -> None:
        self.initial = self.rows = initial

    def run(self, call: Callable[[int], Result]) -> Result:
        """Return `call(rows)`, again with fewer rows whenever memory runs out.

        Raises:
            RuntimeError: of the last call, if even single rows do not fit.
        """
        before = self.rows
        result, self.rows = in_smaller_batches(call, before)
        if self.rows < before:
            text = f"out of memory: from now on {self.rows} rows at once instead of {before}"
            print(text, file=sys.stderr, flush=True)
        return result


def cleared_with(clear: Callable[[], None]) -> None:
    """Let `free_memory` call `clear`, which lets go of what is kept only to save time."""
    _CLEARED.append(clear)


def free_memory() -> None:
    """Free what is kept to save time, and what nothing refers to any more, on an accelerator too."""
    for clear in _CLEARED:
        clear()
    clear_device_cache(garbage_collection=True)


def peak_memory_mib() -> float:
    """Return the most memory that this process held: of torch on its accelerator, else of the whole process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    import resource  # not on every system that trains with PPOTrainer alone

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
