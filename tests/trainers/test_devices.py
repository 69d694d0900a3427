"""Training and evaluation on one GPU mix no tensors of two devices: shown without one."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from ppo_toys import training_steps
from pretended_gpu import GPU, pretended_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.shared import SharedModel

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.from_scratch.hidden_size=32", "model.from_scratch.num_attention_heads=2"]
SMALL += ["model.from_scratch.vocab_size=400", "sft.num_train_epochs=1"]
SMALL += [f"task.max_{split}_examples={count}" for split, count in (("train", 64), ("validation", 16), ("test", 8))]
SMALL += ["ppo.total_episodes=32", "ppo.gradient_accumulation_steps=1", "ppo.per_device_train_batch_size=16"]
SMALL += ["ppo.response_length=6", "eval.samples_per_prompt=2"]


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu() as mode:
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert there.device == GPU and here.to(GPU).is_cuda and there.cpu().is_cpu and here.device.type == "cpu"
        assert (there * torch.tensor(2.0)).is_cuda and there[torch.tensor([1])].is_cuda and there.sum().is_cuda
        there[0:2] = here[0:2]
        here.copy_(there)
        mistakes = [
            lambda: here + there,
            lambda: there.index_select(0, torch.tensor([1])),
            lambda: here[there.long()],
            lambda: here * there.sum(),
            lambda: there.__setitem__(torch.tensor([0, 1]), here[:2]),
            lambda: torch.cat([here, there]),
            lambda: torch.nn.Linear(3, 3)(there),
            there.numpy,
        ]
        for mistake in mistakes:
            with pytest.raises(RuntimeError, match=r"same device|numpy"):
                mistake()
        layer = torch.nn.Linear(3, 3).to(GPU)
        layer(there).sum().backward()
        assert layer.weight.is_cuda and mode.operations > 5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "num_generations": 2,
            "group_baseline": True,
            "vf_coef": 0.0,
            "top_k": 5,
            "top_p": 0.9,
            "num_sample_generations": 1,
        },
        {"score_scaling": "running", "whiten_rewards": True, "kl_placement": "reward"},
        {
            "num_generations": 2,
            "group_baseline": "mean",
            "scale_rewards": "group",
            "kl_placement": "loss",
            "kl_estimator": "k3",
            "min_p": 0.1,
            "repetition_penalty": 1.1,
        },
        {
            "value_model": "adapter",
            "entropy_coef": 0.01,
            "num_mini_batches": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
        {
            "ptx_coef": 0.1,
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
            "mask_truncated_completions": True,
            "target_kl": 0.1,
            "kl_target": 1.0,
        },
        {
            "use_peft": False,
            "importance_sampling_level": "sequence",
            "missing_eos_penalty": 1.0,
            "suppress_tokens": [5],
        },
        {"algorithm": "dapo", "dynamic_sampling_rounds": 2, "stop_strings": ["a"]},
        {"reward_shaping": "prefix", "gamma": 1.0},
    ],
    ids=str,
)
def test_ppo_on_one_gpu(make_trainer, examples, settings):
    with pretended_gpu() as mode:
        trainer = make_trainer(**settings, validation=examples.select(range(4)), total_episodes=16)
        trainer.train()
        assert trainer.shared.language_model.device == GPU and mode.operations > 1000
    assert training_steps(trainer.output_dir)


def test_probe_passes_are_made_on_the_gpu(make_trainer, monkeypatch):
    probed, agrees = [], SharedModel._packing_agrees

    def noted(shared: SharedModel) -> bool:
        probed.append(shared.language_model.device)
        return agrees(shared)

    monkeypatch.setattr(SharedModel, "_packing_agrees", noted)
    with pretended_gpu():
        shared = make_trainer().shared
        assert probed == [GPU] and shared.padding_free
        assert all(weight.is_cpu for weight in shared._initial.values())  # of a GPU they would take memory


@pytest.mark.parametrize(
    ("recipe", "stages", "overrides"),
    [
        ("quickstart_reward_model", "sft reward ppo eval", ["reward.num_train_epochs=1"]),
        ("quickstart_t5", "sft ppo eval", []),
    ],
)
def test_a_chain_on_one_gpu(recipe, stages, overrides, tmp_path):
    scripts = ",".join(str(ROOT / "pipeline" / f"{stage}.py") for stage in stages.split())
    words = [str(ROOT / "recipes" / f"{recipe}.yaml"), f"output_dir={tmp_path}", *SMALL, *overrides]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "pretended_gpu.py"), scripts, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    operations = [
        line.split()[1] for line in done.stderr.splitlines() if line.split()[:1] in [[s] for s in stages.split()]
    ]
    assert len(operations) == len(stages.split()) and all(int(number) > 1000 for number in operations)


class Waits(TorchDispatchMode):
    """Where models ask for what only the device knows: a GPU is waited for until all before that is computed."""

    HOST = ("nonzero", "_local_scalar_dense", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        indexes = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indexes)
        if by_mask or name.startswith(self.HOST):
            frames = [f for f in traceback.extract_stack() if "/pipeline/models/" in f.filename]
            self.places += [f"{name} in {frames[-1].name}, {frames[-1].filename}"] if frames else []
        return function(*args, **(kwargs or {}))


def test_passes_over_a_rollout_look_it_up_once(make_trainer):
    """After the pass that scores a rollout, the four passes of the update ask nothing more of the device."""
    trainer = make_trainer(gradient_accumulation_steps=1, num_ppo_epochs=4)
    with Waits() as scoring:
        experience, _ = trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(0)))
    with Waits() as update:
        trainer.update(experience)
    assert scoring.places and update.places == []
