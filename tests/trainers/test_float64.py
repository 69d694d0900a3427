"""Apple's GPU has no float64: rollouts and updates make such numbers in one function alone, which moves them away."""

import sys

import pytest
import torch
from ppo_toys import colours
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.sampling import Decoding, sample_tokens
from pipeline.rewards import Reward
from pipeline.runtime.devices import float64_device, in_float64, sum_in_float64


class NoFloat64OnDevice(TorchDispatchMode):
    """Take every tensor for one of a device without float64, and every float64 tensor for one that has left it.

    Raises:
        RuntimeError: float64 that `in_float64` and `sum_in_float64` did not make, or an operation on float64 and
            tensors of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.widened = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        if _inside(in_float64) or _inside(sum_in_float64):
            self.widened += 1
            return result
        wide = [x.dtype == torch.float64 for x in given]
        if not any(wide) and any(x.dtype == torch.float64 for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            raise RuntimeError(f"{function} makes float64")
        large = {x.dtype == torch.float64 for x in given if x.dim() and x.is_floating_point()}
        if len(large) > 1 and "copy" not in str(function):
            raise RuntimeError(f"{function} of tensors of two devices")
        return result


def _inside(function) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def length(prompts: list, completions: list, **columns: list) -> list[float]:
    """Characters of a completion."""
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5, "top_p": 0.9, "num_generations": 2, "group_baseline": True, "num_sample_generations": 1},
        {"score_scaling": "running", "whiten_rewards": True, "kl_placement": "reward"},
        {"reward": [Reward("colours", colours, score_scaling="reference"), Reward("length", length)]},
    ],
)
def test_training_makes_no_float64_on_the_device(make_trainer, examples, settings):
    trainer = make_trainer(**settings, validation=examples.select(range(4)), total_episodes=16)
    with NoFloat64OnDevice() as mode:
        trainer.train()
    assert mode.widened > 10 and trainer.shared.language_model.dtype == torch.float32


def test_the_check_finds_float64_and_mixed_devices():
    values = torch.ones(3)
    with NoFloat64OnDevice():
        assert in_float64(values).sum() == 3
        for mistake in (
            values.double,
            lambda: torch.zeros(2, dtype=torch.float64),
            lambda: in_float64(values) * values,
        ):
            with pytest.raises(RuntimeError, match=r"float64|two devices"):
                mistake()


def test_numbers_of_apples_gpu_are_widened_on_the_cpu():
    assert float64_device(torch.device("mps", 0)) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert in_float64(torch.tensor([0.1])).dtype == torch.float64


@pytest.mark.parametrize("vocabulary", [5, 128, 500, 3910])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_draws_are_those_of_sums_over_the_whole_vocabulary(vocabulary, spread):
    torch.manual_seed(0)
    logits, draws = torch.randn(2000, vocabulary) * spread, torch.rand(2000)
    logits[:, vocabulary // 2] = -torch.inf
    cumulative = logits.softmax(-1).double().cumsum(-1)
    expected = torch.searchsorted(cumulative, draws.double().unsqueeze(-1) * cumulative[:, -1:], right=True)
    assert torch.equal(sample_tokens(logits, Decoding(1, 1.0), draws), expected.squeeze(-1))
