"""LoRA layers and norms in few kernels against those of peft and transformers."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from test_decoding import build
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.kernels import fused_layers
from pipeline.models.kernels.fused_layers import FusedLoraLinear, fuse_layers


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    """Let the CPU compute as a GPU does."""
    monkeypatch.setattr(fused_layers, "FUSED_DEVICES", {"cpu"})


class Net(nn.Module):
    """Two dense layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(**options) -> tuple[nn.Module, nn.Module]:
    """The same network twice, as peft makes it and fused, with an adapter away from 0."""
    torch.manual_seed(0)
    options = {"target_modules": ["first", "second"], "r": 3, "lora_alpha": 5} | options
    network = get_peft_model(Net(), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    fused = copy.deepcopy(network)
    fuse_layers(fused)
    return network, fused


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    x = x.clone().requires_grad_()
    network(x).float().square().sum().backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


def count_calls(monkeypatch) -> list[str]:
    """Fill a list with the layers that leave the work to peft."""
    calls, forward = [], LoraLinear.forward

    def counted(layer, *args, **kwargs):
        calls.append(type(layer).__name__)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LoraLinear, "forward", counted)
    return calls


def test_a_layer_by_hand():
    network = get_peft_model(nn.Sequential(nn.Linear(2, 1)), LoraConfig(target_modules=["0"], r=1, lora_alpha=3))
    fuse_layers(network)
    [layer] = [m for m in network.modules() if isinstance(m, FusedLoraLinear)]
    numbers = {"base_layer.weight": [[1.0, 2.0]], "base_layer.bias": [0.5]}
    numbers |= {"lora_A.default.weight": [[1.0, -1.0]], "lora_B.default.weight": [[2.0]]}
    layer.load_state_dict({name: torch.tensor(value) for name, value in numbers.items()})
    output = layer(torch.tensor([[3.0, 1.0]]))
    assert output.tolist() == [[3 + 2 + 0.5 + 3 * 2 * (3 - 1)]]  # W x + b + scaling B A x
    output.sum().backward()
    assert layer.lora_B["default"].weight.grad.tolist() == [[6.0]]  # scaling A x
    assert layer.lora_A["default"].weight.grad.tolist() == [[18.0, 6.0]]  # scaling B x


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_outputs_and_gradients_are_those_of_peft(shape, monkeypatch):
    plain, fused = adapted()
    x = torch.randn(shape)
    expected = plain(x), gradients(plain, x)
    calls = count_calls(monkeypatch)
    torch.testing.assert_close((fused(x), gradients(fused, x)), expected)
    assert len(expected[1]) == 5 and not calls
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fused(x), plain(x))


def test_under_autocast_nothing_is_rounded_that_peft_does_not_round():
    plain, fused = adapted()
    x = torch.randn(64, 6)
    exact, products = plain(x), []
    with torch.autocast("cpu", torch.bfloat16):
        for network in (plain, fused):
            products.append(network(x))
            assert products[-1].dtype == torch.bfloat16
        found, expected = gradients(fused, x), gradients(plain, x)
    errors = [(product.float() - exact).square().mean() for product in products]
    assert errors[1] <= 1.05 * errors[0]
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.1)


def test_an_adapter_of_zeros_changes_no_bit():
    _, network = adapted()
    for module in network.modules():
        if isinstance(module, LoraLinear):
            nn.init.zeros_(module.lora_B["default"].weight)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = torch.randn(4, 6)
            found = network(x)
            with network.disable_adapter():
                assert torch.equal(network(x), found)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_are_left_to_peft(options, monkeypatch):
    plain, fused = adapted(**options)
    x = torch.randn(4, 6)
    expected, calls = plain(x), count_calls(monkeypatch)
    assert torch.equal(fused(x), expected) and calls == ["FusedLoraLinear"] * 2


def test_a_base_in_another_precision_is_left_to_peft_outside_of_autocast(monkeypatch):
    plain, fused = adapted()
    for network in (plain, fused):
        for module in network.modules():
            if isinstance(module, LoraLinear):
                module.base_layer.bfloat16()
    x, calls = torch.randn(4, 6).bfloat16(), count_calls(monkeypatch)
    assert torch.equal(fused(x), plain(x)) and calls.count("FusedLoraLinear") == 2
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x), rtol=0.02, atol=0.02)
    assert "FusedLoraLinear" not in calls


def test_an_adapter_that_comes_later_and_a_merge():
    plain, fused = adapted()
    x = torch.randn(4, 6)
    for network in (plain, fused):
        torch.manual_seed(1)
        network.add_adapter("value", LoraConfig(target_modules=["first", "second"], init_lora_weights=False))
        network.set_adapter("value")
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused.merge_and_unload()(x), plain.merge_and_unload()(x))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_transformers(architecture, dtype):
    model = build(architecture).to(dtype)
    norms = {name: m for name, m in model.named_modules() if hasattr(m, "variance_epsilon")}
    with torch.no_grad():
        for norm in norms.values():
            norm.weight.uniform_(0.5, 2)
    expected = copy.deepcopy(model)
    fuse_layers(model)
    assert norms and all(isinstance(norm, fused_layers._FusedRMSNorm) for norm in norms.values())
    rounding = torch.finfo(dtype).eps
    for name, norm in norms.items():
        x = torch.randn(3, 5, norm.weight.numel(), dtype=dtype, requires_grad=True)
        outputs = [m(x) for m in (norm, expected.get_submodule(name))]
        assert outputs[0].dtype == dtype
        torch.testing.assert_close(*outputs, rtol=3 * rounding, atol=rounding)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in outputs), rtol=0, atol=20 * rounding)


def test_a_norm_by_hand_under_autocast():
    model = build("llama")
    norm = next(m for m in model.modules() if hasattr(m, "variance_epsilon"))
    fuse_layers(model)
    norm.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    norm.variance_epsilon = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.tolist() == [[0.578125, 2.3125]]  # x / sqrt(2.5 + 0.5) * weight


class Norm(nn.Module):
    """A norm of `width` weights that computes what it is given."""

    def __init__(self, compute: Callable, weight: Tensor) -> None:
        super().__init__()
        self.compute, self.weight, self.variance_epsilon = compute, nn.Parameter(weight), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight)


def shifted(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, 1 + weight)


def centred(x: Tensor, weight: Tensor) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight)


def for_each_head(x: Tensor, weight: Tensor) -> Tensor:
    return weight * functional.rms_norm(x, (x.shape[-1],))


@pytest.mark.parametrize(
    ("compute", "weight"),
    [
        (shifted, torch.zeros(8)),
        (centred, torch.full((8,), 0.01)),
        (for_each_head, torch.ones(2, 8)),
        (centred, torch.empty(0)),
        (shifted, torch.empty(8, device="meta")),
    ],
)
def test_other_norms_stay(compute, weight):
    model = nn.Sequential(Norm(compute, weight))
    fuse_layers(model)
    assert type(model[0]) is Norm


def test_a_norm_of_another_precision_than_its_input_is_left_to_transformers():
    """T5 in float16 keeps some layers, and with them its states, in float32, and casts in its norms."""
    plain = build("t5").half()
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    name = next(name for name, m in plain.named_modules() if hasattr(m, "variance_epsilon"))
    norms = [model.get_submodule(name) for model in (plain, fused)]
    x = torch.randn(2, norms[0].weight.numel())
    outputs = [norm(x) for norm in norms]
    assert outputs[0].dtype == outputs[1].dtype == torch.float16 and torch.equal(*outputs)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_fused_model_is_copied_and_pickled(again):
    model = build("llama")
    fuse_layers(model)
    other = again(model)
    ids = torch.arange(1, 6).unsqueeze(0)
    assert torch.equal(other(ids).logits, model(ids).logits)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert model(ids).logits.any()  # nothing is shared
    names = [name for name, m in model.named_modules() if isinstance(m, fused_layers._FusedRMSNorm)]
    assert names == [name for name, m in other.named_modules() if isinstance(m, fused_layers._FusedRMSNorm)]
