"""When the processes of a PPO update exchange their gradients."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from accelerate import Accelerator
from torch import nn

from pipeline.runtime.memory import is_out_of_memory


class LastPassError(Exception):
    """Memory ran out where one of several processes cannot begin anew alone."""


class GradientExchange:
    """Exchange the gradients of micro-batches between processes once, with the last of them.

    What is sharded is exchanged in every pass, because no process holds its gradients whole.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, is_sharded: bool) -> None:
        self.accelerator, self.model, self.is_sharded = accelerator, model, is_sharded

    @property
    def is_needed(self) -> bool:
        """Whether a pass has to go through the model as accelerate wraps it."""
        return self.is_sharded or self.accelerator.num_processes > 1

    def left_out(self) -> AbstractContextManager:
        """Leave the gradients of a pass where they are."""
        return nullcontext() if self.is_sharded else self.accelerator.no_sync(self.model)

    @contextmanager
    def in_pass(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients in the last pass.

        Raises:
            LastPassError: out of memory there, with several processes.
        """
        if not is_last or self.is_sharded:
            with self.left_out():
                yield
            return
        try:
            yield
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or not is_out_of_memory(error):
                raise
            raise LastPassError(f"{error} (in the pass in which the processes exchange gradients)") from error
