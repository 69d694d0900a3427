"""Rows of like length in one batch, whatever the number of processes."""

from collections.abc import Iterator

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_pt_utils import LengthGroupedSampler


class GlobalLengthGroupedSampler(LengthGroupedSampler):
    """The order of `group_by_length`, grouped by the batch of all processes and drawn by the main one for all.

    transformers 5.23 groups by the batch of one process, so that more processes see other batches; and each process
    draws by its own random state, so that after an epoch with dropout some rows would be read twice and others never.
    """

    def __init__(self, of_one_process: LengthGroupedSampler) -> None:
        size = of_one_process.batch_size * PartialState().num_processes
        super().__init__(size, lengths=of_one_process.lengths, generator=of_one_process.generator)

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())  # everywhere, so that all random states move on alike
        return iter(broadcast_object_list([order])[0])
