"""Tensors of which each process writes and reads its slices: any number of processes reads what any other wrote."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from two_processes import run_in_processes

from pipeline.models.slices import whole
from pipeline.trainers import shards
from pipeline.trainers.checkpoints import new_checkpoint, require_finite
from pipeline.trainers.shards import optimizer_tensors, read_optimizer, read_slices, write_slices

WHOLE = ("scalar", "plain")


def numbers() -> dict[str, Tensor]:
    """Whole tensors: rows that no number of processes divides, halves, a single row, a scalar."""
    generator = torch.Generator().manual_seed(0)
    return {
        "uneven": torch.randn(7, 5, generator=generator),
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
        "one row": torch.randn(1, generator=generator),
        "copied": torch.randn(4, generator=generator),
        "plain": torch.randn(3, generator=generator),
        "scalar": torch.tensor(3.0),
    }


def sliced(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a process holds of them; all of it where it is alone."""
    world = PartialState(cpu=True).num_processes
    if world == 1:
        return tensors
    mesh = init_device_mesh("cpu", (world,))
    placed = {name: [Replicate()] if name == "copied" else [Shard(0)] for name in tensors}
    return {n: t if n in WHOLE else distribute_tensor(t, mesh, placed[n]) for n, t in tensors.items()}


def write(folder: Path) -> None:
    write_slices(sliced(numbers()), folder)


def read(folder: Path) -> None:
    tensors = sliced({name: torch.zeros_like(tensor) for name, tensor in numbers().items()})
    read_slices(tensors, folder)
    for name, tensor in numbers().items():
        assert torch.equal(whole(tensors[name]), tensor), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2), (3, 5)])
def test_any_number_of_processes_reads_what_another_wrote(tmp_path, fresh_accelerate, before, after, recwarn):
    for world, call in ((before, write), (after, read)):
        if world == 1:
            call(tmp_path)
        else:
            run_in_processes(world, lambda call=call: call(tmp_path), tmp_path)
    assert len(list(tmp_path.iterdir())) == before
    assert not [warning for warning in recwarn if "torch.distributed" in str(warning.message)]


def test_a_process_that_cannot_write_ends_all_with_the_same_sentence(tmp_path):
    def fail() -> None:
        stop = OSError(28, "No space left on device")

        def full(*given, **named) -> None:
            raise stop

        if PartialState(cpu=True).process_index == 1:
            shards.HuggingFaceStorageWriter.write_data = full
        message = r"cannot write .*checkpoint-1: it needs about 9 bytes"
        with pytest.raises(OSError, match=message), new_checkpoint(tmp_path / "checkpoints", 1, 9) as folder:
            write(folder)

    run_in_processes(2, fail, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_slice_that_is_not_finite_ends_all_with_the_same_sentence(tmp_path):
    """The last row is in the second process's slice."""

    def refuse() -> None:
        tensors = numbers()
        tensors["uneven"][-1] = torch.nan
        with pytest.raises(FloatingPointError, match="step 3: uneven is not finite"):
            require_finite(sliced(tensors), 3)

    run_in_processes(2, refuse, tmp_path)


def test_an_optimizer_that_has_made_no_step_comes_back(tmp_path, fresh_accelerate):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.5)
    write_slices({"weight": weight.detach()} | optimizer_tensors(optimizer), tmp_path)
    again = torch.optim.AdamW([weight], lr=1.0)
    read_optimizer(again, optimizer.state_dict()["param_groups"], tmp_path)
    assert again.param_groups[0]["lr"] == 0.5 and not again.state
