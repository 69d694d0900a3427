"""PPO of a Whisper that is sharded over two gloo processes (FSDP2) ends with the weights of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_toys import SMALL, weights
from safetensors.torch import load_file
from test_sharded_ppo import assert_same, forget, shard
from torch.distributed.fsdp import FSDPModule
from two_processes import run_in_processes

from pipeline.metrics import load_metric
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_tokenizer, lora_config
from pipeline.rewards.metric import metric_reward
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"use_peft": False},
    "in step": {"value_model": "adapter", "gradient_checkpointing": True},
}
FILES = {"full": "model.safetensors"}


class Spoken:
    """What every process needs to build the same trainer."""

    def __init__(self, directory: Path, config: ModelConfig, examples: Dataset, root: Path) -> None:
        self.directory, self.config, self.examples, self.root = directory, config, examples, root

    def run(self, kind: str, world: int) -> None:
        """Train, and keep the weights."""
        settings = {
            **SMALL,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4 // world,
            "learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
            "top_k": 1,
            "kl_coef": 0.2,
            "eval_steps": 2,
            "load_best_model_at_end": False,
            **KINDS[kind],
        }
        trainer = PPOTrainer(
            model=load_model(self.directory, self.config),
            args=PPOConfig(**settings),
            processing_class=load_tokenizer(self.directory, self.config),
            reward_funcs=metric_reward(load_metric("wer")),
            train_dataset=self.examples,
            eval_dataset=self.examples.select(range(5)),
            peft_config=lora_config(self.config),
            output_dir=self.root / f"{kind}-{world}",
        )
        # As where a device does not hold the whole model.
        trainer.learner.sharding.memory = 0 if kind == "in step" else trainer.learner.sharding.memory
        assert isinstance(trainer.shared, FSDPModule) == (world > 1)
        before = weights(trainer)
        trainer.train()
        trainer.save_model()
        state = weights(trainer)
        if trainer.accelerator.is_main_process:
            assert max(float((state[name] - before[name]).abs().max()) for name in state) > 1e-3
            torch.save(state, self.root / f"{kind}-{world}.pt")


@pytest.fixture(scope="module")
def runs(taught_whisper_directory, whisper_config, spoken, tmp_path_factory) -> Spoken:
    """Runs of two processes and of one."""
    made = Spoken(taught_whisper_directory, whisper_config, spoken, tmp_path_factory.mktemp("sharded"))
    run_in_processes(2, lambda: (shard(), [made.run(kind, 2) for kind in KINDS]), made.root)
    for kind in KINDS:
        forget()
        made.run(kind, 1)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_weights_of_one(runs, kind):
    assert_same(*(torch.load(runs.root / f"{kind}-{world}.pt") for world in (1, 2)))
    file = FILES.get(kind, "adapter_model.safetensors")
    assert_same(*(load_file(runs.root / f"{kind}-{world}" / file) for world in (1, 2)))
