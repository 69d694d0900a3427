"""Out of memory: told from other errors, and answered with smaller batches that give the same result."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
WORDS = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")  # of CPU allocators


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on an accelerator or on the machine itself."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def in_smaller_batches(call: Callable[[int], Result], size: int) -> tuple[Result, int]:
    """`call(size)`, and where memory runs out again with half the size, down to 1; the result and the size it took.

    Raises:
        RuntimeError: of the last call, if even single rows do not fit.
    """
    while True:
        try:
            return call(size), size
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if size == 1 or not is_out_of_memory(error):
                raise
        # Behind the block, where the traceback no longer holds the tensors of the pass that failed.
        size = (size + 1) // 2
        free_memory()


def free_memory() -> None:
    """Give back what nothing refers to any more, on an accelerator too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
