"""The fused LoRA layer against peft's own forward pass and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from pipeline.models.kernels import fused_lora
from pipeline.models.kernels.fused_lora import fuse_adapters


class Net(nn.Module):
    """Two dense layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(fused: bool, **options) -> nn.Module:
    """The same weights each time, the adapter away from 0."""
    torch.manual_seed(0)
    network = get_peft_model(Net(), LoraConfig(target_modules=["first", "second"], r=3, lora_alpha=5, **options))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    if fused:
        fuse_adapters(network)
    return network


def layers(network: nn.Module) -> list[LoraLinear]:
    return [module for module in network.modules() if isinstance(module, LoraLinear)]


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    network(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("budget", [2**30, 0], ids=["merged", "apart"])
def test_outputs_and_gradients_are_those_of_peft(monkeypatch, budget):
    monkeypatch.setattr(fused_lora, "COPY_BUDGET", budget)
    plain, fused = adapted(False), adapted(True)
    x = torch.randn(2, 3, 6)
    for _ in range(2):  # again after a step: what was copied is made anew
        torch.testing.assert_close(fused(x), plain(x))
        expected, found = gradients(plain, x), gradients(fused, x)
        torch.testing.assert_close(found, expected)
        assert len(found) == 4 and all(gradient.any() for gradient in found.values())
        for network in (plain, fused):
            torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1).step()
    copies = [layer.forward.args[1] for layer in layers(fused)]
    assert all((copy is None) == (budget == 0) for copy in copies)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    shapes = {"x": (4, 6), "down": (3, 6), "up": (5, 3)}
    x, down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def apart(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return fused_lora._AdaptedProduct.apply(x, weight, bias, down, up, 0.7, False)

    assert torch.autograd.gradcheck(apart, (x, down, up))


def test_switched_off_it_is_the_base_exactly():
    network, x = adapted(True), torch.randn(4, 6)
    base = Net()
    base.load_state_dict(
        {
            f"{name}.{part}": getattr(layer.base_layer, part)
            for name, layer in zip(("first", "second"), layers(network), strict=True)
            for part in ("weight", "bias")
            if getattr(layer.base_layer, part) is not None
        }
    )
    with network.disable_adapter():
        assert torch.equal(network(x), base(x))
    assert not torch.equal(network(x), base(x))


def test_an_adapter_of_zeros_changes_no_bit():
    network, x = adapted(True), torch.randn(4, 6)
    for layer in layers(network):
        nn.init.zeros_(layer.lora_B["default"].weight)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = network(x)
            with network.disable_adapter():
                assert torch.equal(network(x), found)


def test_autocast_keeps_small_changes_apart_and_casts_a_frozen_weight_once():
    plain, fused = adapted(False), adapted(True)
    x = torch.randn(16, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x), rtol=0.02, atol=0.02)
        found, expected = gradients(fused, x), gradients(plain, x)
        copies = [layer.forward.args[1].weight for layer in layers(fused)]
        fused(x)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.1)
    for layer, copy in zip(layers(fused), copies, strict=True):
        assert layer.forward.args[1].weight is copy
        assert torch.equal(copy, layer.base_layer.weight.bfloat16())  # without the adapter


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_keep_pefts_forward(options):
    x = torch.randn(4, 6)
    assert torch.equal(adapted(True, **options)(x), adapted(False, **options)(x))
    assert all("forward" not in vars(layer) for layer in layers(adapted(True, **options)))
