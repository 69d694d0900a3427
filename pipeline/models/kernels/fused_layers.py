"""Layers that a GPU computes in fewer kernels: LoRA layers and RMS norms.

peft adds an adapter in three passes over what a dense layer makes, after casts of what the layer reads; transformers
takes a norm in eight. Each is a launch, and memory read and written. On other devices nothing changes.
"""

import copy
import inspect
from functools import cache

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

FUSED_DEVICES = {"cuda"}


def fuse_layers(model: nn.Module) -> None:
    """Let the LoRA layers over plain dense layers, and the RMS norms, compute in few kernels, with the same weights.

    A norm is one that gives what torch's `rms_norm` gives. Adapters that are added later compute so too.
    """
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLoraLinear
        elif _is_rms_norm(module):
            module.__class__ = _fused_norm(type(module))


class FusedLoraLinear(LoraLinear):
    """A LoRA layer whose adapter is added by one product: `x W^T + b`, then `+= scaling (x A^T) B^T`."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Map `x [..., in]` to [..., out]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = x.device.type in FUSED_DEVICES and x.dim() > 1 and not (args or kwargs)
        if (
            not is_plain
            or self.disable_adapters
            or self.merged
            or len(names) != 1
            or not self._is_fusible(names[0], x)
        ):
            return super().forward(x, *args, **kwargs)
        name = names[0]
        result, reduced = self.base_layer(x), self.lora_A[name](self.lora_dropout[name](x))
        rows = result.flatten(0, -2), reduced.flatten(0, -2)
        return torch.addmm(*rows, self.lora_B[name].weight.T, alpha=self.scaling[name]).view_as(result)

    def _is_fusible(self, name: str, x: Tensor) -> bool:
        """Whether the adapter is a product of two matrices, in the precision of the dense layer."""
        types = {x.dtype, self.base_layer.weight.dtype, self.lora_A[name].weight.dtype}
        same = len(types) == 1 or torch.is_autocast_enabled(x.device.type)
        return same and x.dim() > 1 and name not in self.lora_variant and not self.lora_bias[name]


class _FusedRMSNorm(nn.Module):
    """What is put before the class of a norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = hidden_states.device.type
        if kind not in FUSED_DEVICES or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        with torch.autocast(kind, enabled=False):  # it would compute, and return, float32
            return _rms_norm(hidden_states, self)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Copy and pickle by the class of the norm, which has a name to be found by."""
        return _restored, (type(self).__mro__[2], self.__dict__)


def _restored(kind: type[nn.Module], state: dict[str, object]) -> nn.Module:
    module = kind.__new__(kind)
    module.__dict__.update(state)
    module.__class__ = _fused_norm(kind)
    return module


def _rms_norm(hidden_states: Tensor, norm: nn.Module) -> Tensor:
    return functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


@cache
def _fused_norm(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_FusedRMSNorm, kind), {"__module__": kind.__module__})


def _is_rms_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm with one weight for each feature that computes what `rms_norm` does."""
    parameters = dict(module.named_parameters())
    if isinstance(module, _FusedRMSNorm) or parameters.keys() != {"weight"} or not hasattr(module, "variance_epsilon"):
        return False
    weight, arguments = parameters["weight"], inspect.signature(module.forward).parameters
    has_numbers = not weight.is_meta and not isinstance(weight, DTensor) and weight.numel() > 0
    if not has_numbers or weight.dim() != 1 or len(arguments) != 1:
        return False
    probed, probe = copy.deepcopy(module), torch.linspace(-2, 3, weight.numel()).to(weight).view(1, 1, -1)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        probed.weight.fill_(1)  # with small weights all norms are alike
        return torch.allclose(probed(probe), _rms_norm(probe, probed), rtol=0.02, atol=0.02)
