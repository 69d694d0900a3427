"""Tensors of which each process may hold a slice: gathered whole for a file, and sliced again from one."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def slice_here(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of a tensor that may be sharded; every process calls it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()).cpu()


def whole_on_main(tensor: Tensor) -> Tensor:
    """Return what `whole` does; of a sharded tensor the main process alone gets the numbers, and others none.

    Every process calls it.
    """
    gathered = whole(tensor)
    return gathered if PartialState().is_main_process or not isinstance(tensor, DTensor) else gathered.new_empty(0)


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """Shard a whole tensor, which every process has, as `target` is; as it is where `target` is not sharded."""
    if not isinstance(target, DTensor) or isinstance(tensor, DTensor):
        return tensor
    device = target.device_mesh.device_type
    return distribute_tensor(tensor.to(device), target.device_mesh, target.placements, src_data_rank=None)


def keep_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Let the states that an optimizer gives and takes be whole, on the CPU; every process asks it for them.

    The main process alone gets them. A checkpoint is then the same for any number of processes, sharded or not.
    """

    def gather(_: torch.optim.Optimizer, state: dict) -> dict:
        return _with_tensors(state, lambda value, _: whole_on_main(value))

    def shard(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        return _with_tensors(state, lambda value, number: like(value, weights[number]) if value.dim() else value)

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(shard)


def _with_tensors(state: dict, change: Callable[[Tensor, int], Tensor]) -> dict:
    """Return an optimizer's state with other tensors, each changed by its weight's number."""
    states = {
        number: {key: change(value, number) if isinstance(value, Tensor) else value for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": states}
