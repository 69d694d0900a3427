"""A PPOTrainer over the tiny model that has learnt its language."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ppo_toys import SMALL, colours

from pipeline.models.loading import lora_config
from pipeline.trainers.config import PPOConfig
from pipeline.trainers.ppo import PPOTrainer


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
