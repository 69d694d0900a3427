"""Batches of examples of similar length that do not depend on the number of processes."""

from collections.abc import Iterator

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_pt_utils import LengthGroupedSampler


class GlobalLengthGroupedSampler(LengthGroupedSampler):
    """A sampler for `group_by_length` that groups by the batch of all processes and whose order the main one draws.

    transformers 5.23 groups by the batch of one process, so the batches depend on the number of processes. There each
    process also draws its own order: once dropout has moved their random states apart, some examples would be read
    twice and others never.
    """

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        size = sampler.batch_size * PartialState().num_processes
        super().__init__(size, lengths=sampler.lengths, generator=sampler.generator)

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())  # on every process, so that all random states advance equally
        return iter(broadcast_object_list([order])[0])
