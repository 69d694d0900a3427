"""A GPU for machines without one: what is moved there is followed, and what a GPU would refuse is refused."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import TrainingArguments

from pipeline.models.kernels import static_step

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.type_as}
SETTERS = {Tensor.data.__set__, Tensor.grad.__set__}
ANYWHERE = MOVES | SETTERS | {torch._has_compatible_shallow_copy_type}  # take tensors of two places
OF_A_GPU = {
    Tensor.device.__get__: GPU,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.get_device: 0,
}
ELSEWHERE = (torch.load, torch.get_rng_state, torch.set_rng_state)  # always on the CPU


class PretendedGPU(TorchFunctionMode):
    """Keep every tensor on the CPU, and say of those that were moved to `cuda:0` that they are there.

    A tensor of which nothing is known, such as one made by autograd in C++, is taken for one of either place.

    Raises:
        RuntimeError: an operation on tensors of two places, as torch raises it on a machine with a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = WeakTensorKeyDictionary()
        self.operations = 0  # on the pretended GPU

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in OF_A_GPU and self.places.get(args[0]) == GPU:
            return OF_A_GPU[function]
        target, args, kwargs = _target(function, args, kwargs, self.places)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [self.places.get(x) for x in given]
        if function not in ANYWHERE:
            self._check(function, args, given, here)
        if function in (Tensor.numpy, Tensor.__array__) and here[0] == GPU:
            raise RuntimeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        result = function(*args, **kwargs)
        if function in SETTERS:
            self.places[args[0]] = here[-1] if len(here) > 1 else here[0]
            return result
        place = _place(function, target, here)
        if place is None:
            return result
        if place == GPU:
            self.operations += 1

        def mark(tensor: Tensor) -> Tensor:
            if any(tensor is x for x in given) and self.places.get(tensor) != place:
                if function not in MOVES or target is None:
                    return tensor
                tensor = tensor.clone()  # which a move to another device makes
            self.places[tensor] = place
            return tensor

        return tree_map_only(Tensor, mark, result)

    def _check(self, function: Callable, args: tuple, given: list[Tensor], here: list[torch.device | None]) -> None:
        known = {place for x, place in zip(given, here, strict=True) if x.dim() and place is not None}
        scalars = {place for x, place in zip(given, here, strict=True) if not x.dim() and place == GPU}
        if function in (Tensor.__getitem__, Tensor.__setitem__) and here[0] != CPU:
            index = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            value = args[2] if len(args) > 2 and isinstance(args[2], Tensor) and args[2].dim() else None
            if value is None or not index or self.places.get(value) != CPU:
                return  # indices and slices may be of the CPU
        if len(known | scalars) > 1:
            name = getattr(function, "__qualname__", function)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def _place(function: Callable, target: torch.device | None, here: list) -> torch.device | None:
    """Where the results of a call are."""
    if function is Tensor.copy_:
        return here[0]
    if target is not None:
        return target
    if GPU in here:
        return GPU
    return CPU if function in ELSEWHERE or all(place == CPU for place in here) else None


def _target(function: Callable, args: tuple, kwargs: dict, places: Any) -> tuple[torch.device | None, tuple, dict]:
    """The device that a call names, and its arguments with the CPU instead."""
    if function is Tensor.cpu:
        return CPU, args, kwargs
    if function is Tensor.cuda:
        return GPU, args[:1], {}
    if function is Tensor.type_as or (function is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor)):
        return places.get(args[1]), args, kwargs
    is_first = function is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device | str | int)
    named = args[1] if is_first else kwargs.get("device")
    if named is None:
        return None, args, kwargs
    target = torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
    if target.type == "cuda":
        if is_first:
            args = (args[0], CPU, *args[2:])
        else:
            kwargs["device"] = CPU
        return GPU, args, kwargs
    return (CPU if target == CPU else None), args, kwargs  # meta stays what it is


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Let accelerate find a GPU until the block ends. CUDA graphs, of which nothing can be pretended, are left out."""
    properties = SimpleNamespace(name="pretended", total_memory=2**36, multi_processor_count=132, major=9, minor=0)
    device = property(lambda state: GPU, lambda state, found: None)
    make = nn.Parameter.__new__
    mode = PretendedGPU()

    def make_parameter(cls: type, data: Tensor | None = None, *args: Any, **kwargs: Any) -> nn.Parameter:
        parameter = make(cls, data, *args, **kwargs)
        if data is not None and data in mode.places:
            mode.places[parameter] = mode.places[data]
        return parameter

    with (
        mode,
        patch.object(nn.Parameter, "__new__", make_parameter),
        patch.dict(os.environ, ACCELERATE_USE_CPU="false"),
        patch.object(PartialState, "device", device, create=True),
        patch.object(AcceleratorState, "device", device, create=True),
        patch.object(TrainingArguments, "device", property(lambda args: args._setup_devices and GPU)),
        patch.object(TrainingArguments, "n_gpu", 1),
        patch.object(static_step, "can_capture", lambda model: False),
        patch("pipeline.models.kernels.static_decode.can_capture", lambda model: False),
        patch("torch.cuda.get_device_properties", lambda device=None: properties),
        # Where a backward pass computes layers again, nothing is pretended.
        patch("pipeline.models.kernels.fused_layers.FUSED_DEVICES", {"cuda", "cpu"}),
    ):
        yield mode


if __name__ == "__main__":  # python pretended_gpu.py SCRIPT,SCRIPT,... ARGUMENT ...
    _, scripts, *arguments = sys.argv
    with pretended_gpu() as running:
        for script in scripts.split(","):
            sys.argv, running.operations = [script, *arguments], 0
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise
            print(Path(script).stem, running.operations, file=sys.stderr)
