"""What two processes send each other in one PPO step, counted, against the arithmetic of docs/scaling.md."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ppo_toys import SMALL, colours
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from two_processes import run_in_two

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_tokenizer, lora_config
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

EPOCHS, MINI_BATCHES = 3, 2
SETTINGS = {
    **SMALL,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,  # micro-batches, of which the last of a mini-batch alone sends
    "num_ppo_epochs": EPOCHS,
    "num_mini_batches": MINI_BATCHES,
}


def count(directory: Path, config: ModelConfig, examples: Dataset, root: Path) -> None:
    """One step of each kind; each process writes what it gave to all-reduces: gradients, and all of them."""
    for kind, settings in (("lora", {}), ("full", {"use_peft": False})):
        trainer = PPOTrainer(
            model=load_model(directory, config),
            args=PPOConfig(**{**SETTINGS, **settings}),
            processing_class=load_tokenizer(directory, config),
            reward_funcs=colours,
            train_dataset=examples,
            peft_config=lora_config(config),
            output_dir=root / kind,
        )
        gradients, everything, calls = [], [], torch.distributed.all_reduce

        def hook(group, bucket: GradBucket, sizes=gradients):
            sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(group, bucket)

        def reduced(tensor: torch.Tensor, *args, sizes=everything, call=calls, **kwargs):
            sizes.append(tensor.numel() * tensor.element_size())
            return call(tensor, *args, **kwargs)

        trainer.learner.model.register_comm_hook(None, hook)
        experience, _ = trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(0)))
        torch.distributed.all_reduce = reduced
        trainer.update(experience)
        torch.distributed.all_reduce = calls
        trained = sum(p.numel() for p in trainer.shared.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in trainer.shared.parameters())
        torch.save([gradients, everything, trained, whole], root / f"{kind}-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def counted(taught_directory, model_config, examples, tmp_path_factory) -> Path:
    """What two processes counted."""
    root = tmp_path_factory.mktemp("counted")
    run_in_two(partial(count, taught_directory, model_config, examples, root), root)
    return root


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_of_what_is_trained_are_all_that_a_step_sends(counted, kind):
    for rank in range(2):
        gradients, everything, trained, whole = torch.load(counted / f"{kind}-{rank}.pt")
        # One float32 number for each trained weight, once an optimizer step.
        assert sum(gradients) == 4 * trained * EPOCHS * MINI_BATCHES
        # Beside them the numbers of tokens and of episodes, and nine sums of the loss.
        assert sum(everything) - sum(gradients) == (2 * 8 + 9 * 4) * EPOCHS * MINI_BATCHES
        assert (trained < 0.5 * whole) == (kind == "lora")


def test_adapters_of_the_models_in_the_docs():
    """LoRA of rank 16 on every linear layer of Llama 2, of 7B and of 70B parameters."""

    def adapter(width: int, keys: int, feed: int, layers: int, rank: int = 16) -> int:
        attention = 2 * (width + width) + 2 * (width + keys)  # q and o, k and v
        return layers * rank * (attention + 3 * (width + feed))

    assert adapter(4096, 4096, 11008, 32) == 39_976_960
    assert adapter(8192, 1024, 28672, 80) == 207_093_760
