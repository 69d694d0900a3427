"""A PPOTrainer over the tiny model that has learnt its language."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ppo_toys import SMALL, colours
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.models.loading import lora_config
from pipeline.trainers.config import PPOConfig
from pipeline.trainers.ppo import PPOTrainer


@pytest.fixture
def float64_norms(monkeypatch) -> None:
    """Norms in the precision of the model: transformers' own take float64 through float32, there and back."""

    def forward(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def make_trainer(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate) -> Callable[..., PPOTrainer]:
    """Each call builds a trainer over a fresh copy of the taught model; keywords of PPOConfig change `SMALL`."""

    def make(
        output: str | Path = "ppo",
        reward=colours,
        seed: int = 0,
        train=examples,
        validation=None,
        processing_class=tokenizer,
        compute_metrics=None,
        model=None,
        peft_config=None,
        **settings,
    ) -> PPOTrainer:
        return PPOTrainer(
            model=model or taught(),
            args=PPOConfig(**{**SMALL, **settings}),
            processing_class=processing_class,
            reward_funcs=reward,
            train_dataset=train,
            eval_dataset=validation,
            peft_config=peft_config or lora_config(model_config),
            output_dir=tmp_path / output,
            seed=seed,
            compute_metrics=compute_metrics,
        )

    return make
