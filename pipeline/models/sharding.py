"""Shard models over processes by PyTorch's FSDP2: each holds a slice, and gathers a unit for as long as it computes.

Units are the layers of a model, and all else of it: embeddings, the LM head, heads of Relay's own. Processes gather a
unit together, so before each exchange they vote, on the CPU, which one is next. A process that has nothing left to
compute gathers what others want until nobody wants anything: processes may make different numbers of passes without
gradients. Where memory runs out on one, the vote says so, and all of them begin anew.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from pipeline.runtime.distributed import launched_engine
from pipeline.runtime.memory import is_out_of_memory
from pipeline.runtime.watchdog import timeout_minutes

Result = TypeVar("Result")
NOTHING = 2**40  # a ballot of a process that wants no unit
SHARE_OF_MEMORY = 0.5  # of a device, that a gathered model may take: caches and activations need the rest


class OutOfMemoryError(RuntimeError):
    """Memory ran out on at least one of the processes that share a model, and all of them have stopped."""


class Sharding:
    """The models that the processes share, unit by unit. Without a model in it every method is a plain call.

    Every process makes the same calls of its methods in the same order.
    """

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []
        self.units: dict[int, nn.Module] = {}  # by number: layers come before the model that holds them
        self.traffic, self.memory = Traffic(), 0
        self.whole_bytes: dict[nn.Module, int] = {}  # of each model, gathered
        self._rare: set[nn.Module] = set()
        self._group: distributed.ProcessGroup | None = None
        self._is_serving = self._is_open = False

    def place(self, root: nn.Module, methods: Sequence[str] = (), rare: nn.Module | None = None) -> None:
        """Move a model to this process's device: whole, or a slice of it where accelerate launch asks for FSDP2.

        As a slice, it computes in calls of `forward`, of `methods`, and in `gathered`. Its weights are other objects
        afterwards, so an optimizer is made later. `rare` is a module in it that few passes need, which is never
        gathered whole.
        """
        if not shards_models():
            root.to(PartialState().device)
            return
        if self._group is None:
            patience = timedelta(minutes=timeout_minutes(), seconds=30)
            self._group = distributed.new_group(backend="gloo", timeout=patience)
            self.memory = self._lowest(device_memory())
        mesh, layers = device_mesh(), repeated_layers(root)
        self._rare |= set() if rare is None else set(rare.modules())
        self.whole_bytes[root] = gathered_bytes(root, [layer for layer in layers if layer not in self._rare])
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(root, mesh=mesh, reshard_after_forward=True)
        for method in methods:
            register_fsdp_forward_method(root, method)
        for unit in (*layers, root):
            number = max(self.units, default=-1) + 1
            unit.set_custom_all_gather(_AllGather(self, number))
            unit.set_custom_reduce_scatter(_ReduceScatter(self, number))
            self.units[number] = unit
        self.roots.append(root)
        root.first_pass = lambda: None  # FSDP takes what is called first for the root, and that may be a layer
        register_fsdp_forward_method(root, "first_pass")
        root.first_pass()

    def remove(self, root: nn.Module) -> None:
        """Forget a model, which no process uses any more."""
        self.roots.remove(root)
        del self.whole_bytes[root]
        gone = set(root.modules())
        self.units, self._rare = {n: unit for n, unit in self.units.items() if unit not in gone}, self._rare - gone

    @property
    def gathers_whole(self) -> bool:
        """Whether the models fit on a device whole, and leave room for what passes over them need."""
        return sum(self.whole_bytes.values()) <= SHARE_OF_MEMORY * self.memory

    def together(self, call: Callable[[], Result]) -> Result:
        """Return `call()`, in which each process may make passes over the models.

        Raises:
            OutOfMemoryError: on every process, where memory ran out on one of them.
        """
        if not self.roots:
            return call()
        for root in self.roots:
            root.reset_iter_state()
        try:
            result = call()
            self._serve_others()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not isinstance(error, OutOfMemoryError):
                self._report_failure()
            failure = OutOfMemoryError(str(error))
        else:
            return result
        # After the block: there the traceback no longer holds the tensors of the pass that failed.
        for root in self.roots:
            root.zero_grad()  # of weights that are gathered, from a backward pass that was cut off
            root.reset_iter_state()
        raise failure

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let every process make passes without gradients of any number, to write or score texts, in this block.

        Where the whole models fit on a device they are gathered once. Else their layers are, for each pass, by all
        processes in step. In the block they exchange nothing else.
        """
        if not self.roots or self._is_open:
            yield
            return
        self._is_open, units = True, self.roots
        if self.gathers_whole:
            units = [unit for unit in self.units.values() if unit not in self._rare]
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
            self._serve_others()
        finally:
            self._is_open = False
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()

    def take_turn(self, number: int) -> None:
        """Return when all processes are about to exchange the same `number`; gather what others want before."""
        if self._is_serving:
            return
        while (wanted := self._vote(number)) != number:
            self._gather_for_others(wanted)

    def _serve_others(self) -> None:
        while (wanted := self._vote(NOTHING)) != NOTHING:
            self._gather_for_others(wanted)

    def _gather_for_others(self, number: int) -> None:
        if number not in self.units:
            raise RuntimeError("the processes make different numbers of passes with gradients")
        self._is_serving = True
        try:
            self.units[number].unshard()
            self.units[number].reshard()
        finally:
            self._is_serving = False

    def _vote(self, number: int) -> int:
        """Return the lowest number that a process wants; a model's own comes after those of its layers.

        Raises:
            OutOfMemoryError: memory ran out on one of the processes.
        """
        ballot = torch.tensor([number, 0])
        distributed.all_reduce(ballot, distributed.ReduceOp.MIN, self._group)
        wanted, failed = ballot.tolist()
        if failed:
            raise OutOfMemoryError("out of memory on another process")
        return wanted

    def _lowest(self, number: int) -> int:
        """Return the lowest number of all processes."""
        lowest = torch.tensor(number)
        distributed.all_reduce(lowest, distributed.ReduceOp.MIN, self._group)
        return int(lowest)

    def _report_failure(self) -> None:
        distributed.all_reduce(torch.tensor([NOTHING, -1]), distributed.ReduceOp.MIN, self._group)


@dataclass
class Traffic:
    """The bytes that the models' units came to in this process: gathered, and reduced to slices."""

    gathered: int = 0
    reduced: int = 0


class _AllGather:
    """Gather a unit's weights when it is its turn."""

    def __init__(self, sharding: Sharding, number: int) -> None:
        self.sharding, self.number = sharding, number

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make room for what is exchanged."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, async_op: bool = False
    ) -> distributed.Work | None:
        """Exchange, as FSDP calls it."""
        self.sharding.take_turn(self.number)
        self.sharding.traffic.gathered += output_tensor.numel() * output_tensor.element_size()
        return distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_AllGather):
    """Add up a unit's gradients when it is its turn; each process gets its slice."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: object = None,
        async_op: bool = False,
    ) -> distributed.Work | None:
        """Exchange, as FSDP calls it."""
        self.sharding.take_turn(NOTHING // 2 + self.number)  # no other process can do it in another's stead
        self.sharding.traffic.reduced += input_tensor.numel() * input_tensor.element_size()
        return distributed.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def shards_models() -> bool:
    """Tell whether accelerate launch was told to shard models by FSDP, and has made processes that can."""
    return launched_engine() == "FSDP" and distributed.is_initialized()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model, or a part of it, is in slices while nobody computes with it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def device_mesh() -> DeviceMesh:
    """Return the processes as accelerate launch was told to use them: a slice for each, or slices inside a machine."""
    state = PartialState()
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
        return config.build_device_mesh(state.device.type)[tuple(config.fsdp_dim_names)]
    return init_device_mesh(state.device.type, (state.num_processes,))


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: the members of its outermost lists of modules."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            layers += [layer for layer in module if next(layer.parameters(), None) is not None]
            inside |= set(module.modules())
    return layers


def gathered_bytes(root: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Count the bytes of whole `layers` of a model, and of all that is in no layer."""
    inside = {weight for layer in repeated_layers(root) for weight in layer.parameters()}
    counted = {weight for layer in layers for weight in layer.parameters()}
    counted |= {weight for weight in root.parameters() if weight not in inside}
    return sum(weight.numel() * weight.element_size() for weight in counted)


def device_memory() -> int:
    """Return the bytes of memory of this process's device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total
