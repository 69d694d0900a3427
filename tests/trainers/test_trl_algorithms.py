"""RLOO, GRPO and its kin against the trainers of TRL: the same loss and gradient on the same completions."""

import copy

import pytest
import torch
from ppo_toys import colours
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pipeline.trainers.ppo.trainer import PPOTrainer

EPISODES, LENGTH, GROUP = 16, 4, 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Settings of Relay, the trainer of TRL, and its settings where they are not its defaults.
CASES: dict[str, tuple[dict, type, dict]] = {
    "rloo": ({"algorithm": "rloo", "kl_coef": 0.3}, RLOOTrainer, {"beta": 0.3}),
    "rloo without KL": (
        {"algorithm": "rloo", "kl_coef": 0.0, "cliprange": 0.02},
        RLOOTrainer,
        {"beta": 0.0, "epsilon": 0.02},
    ),
    "grpo": ({"algorithm": "grpo"}, GRPOTrainer, {"beta": 0.04, "loss_type": "grpo"}),
    "gspo": (
        {"algorithm": "grpo", "importance_sampling_level": "sequence", "kl_coef": 0.5, "cliprange": 0.01},
        GRPOTrainer,
        {"beta": 0.5, "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    ),
    "dr_grpo": ({"algorithm": "dr_grpo"}, GRPOTrainer, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (
        {"algorithm": "dapo", "cliprange": 0.05, "cliprange_high": 0.1},
        GRPOTrainer,
        {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.1},
    ),
    "dapo with a bound on ratios": (
        {"algorithm": "dapo", "cliprange": 0.05, "cliprange_high": 0.1, "dual_clip": 1.15},
        GRPOTrainer,
        {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.1, "delta": 1.15},
    ),
    "truncated completions masked, dapo": (
        {"algorithm": "dapo", "mask_truncated_completions": True, "cliprange_high": None},
        GRPOTrainer,
        {"loss_type": "dapo", "mask_truncated_completions": True},
    ),
    "truncated completions masked, grpo": (
        {"algorithm": "grpo", "mask_truncated_completions": True, "kl_coef": 0.5},
        GRPOTrainer,
        {"loss_type": "grpo", "beta": 0.5, "mask_truncated_completions": True},
    ),
}


def moved(model: PreTrainedModel, seed: int, size: float = 0.03) -> PreTrainedModel:
    """The same model some way off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def trl_trainer(kind: type, settings: dict, folder, tokenizer, examples, tmp_path):
    """The trainer of TRL over the model in `folder`, whose policy is moved as Relay's."""
    config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind](
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=EPISODES,
        steps_per_generation=1,
        num_generations=GROUP,
        num_iterations=2,  # so that it keeps the log-probs before the first step
        max_completion_length=LENGTH,
        temperature=0.8,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
        **settings,
    )
    trainer = kind(
        model=str(folder), reward_funcs=colours, args=config, train_dataset=examples, processing_class=tokenizer
    )
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.double()
    moved(trainer.model, seed=1)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def relay_gradient(trainer: PPOTrainer, experience) -> tuple[float, dict[str, Tensor]]:
    """The loss of one optimizer step, and the gradient it would make, which is not made."""
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        named = trainer.shared.language_model.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    trainer.optimizer.step = keep
    step = trainer.learner.optimizer_step(experience)
    return step.mean("policy") + experience.kl_coef * step.mean("reference_kl"), gradients


@pytest.mark.parametrize("micro_batch", [EPISODES, 4])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(
    make_trainer, taught, taught_directory, tokenizer, examples, tmp_path, float64_norms, case, micro_batch
):
    settings, kind, trl_settings = CASES[case]
    trainer = make_trainer(
        model=taught().double(),
        use_peft=False,
        temperature=0.8,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=EPISODES // micro_batch,
        max_grad_norm=1e9,
        **{"num_generations": GROUP, "num_ppo_epochs": 1, **settings},
    )
    moved(trainer.shared.language_model, seed=1)
    rows = trainer.prompt_rows(0)
    rollout = trainer.collect_rollout(rows)
    experience, _ = trainer.compute_advantages(rollout)
    sequences = rollout.sequences
    prompts = [ids[mask].tolist() for ids, mask in zip(sequences.prompt_ids, sequences.prompt_mask, strict=True)]
    completions = [
        ids[mask].tolist() for ids, mask in zip(sequences.completion_ids, sequences.completion_mask, strict=True)
    ]
    assert 0 < rollout.finished.sum() < EPISODES and rollout.scores.std() > 0

    other = trl_trainer(kind, trl_settings, taught_directory, tokenizer, examples, tmp_path)
    texts = list(rollout.completions)
    if kind is GRPOTrainer:
        other._generate = lambda _: (prompts, completions, None, texts, None, {}, None, None)
    else:
        other._generate = lambda _: (prompts, completions, texts)
    other.model.train()
    inputs = other._generate_and_score_completions([examples[row] for row in rows])
    for step_size in (0.0, 0.01):  # the ratios of the first step, and others
        moved(trainer.shared.language_model, seed=2, size=step_size)
        trainer.learner.drop_graph()  # that of the weights before
        moved(other.model, seed=2, size=step_size)
        other.model.zero_grad()
        loss = other._compute_loss(other.model, copy.copy(inputs))
        loss.backward()
        expected = {name: p.grad for name, p in other.model.named_parameters() if p.grad is not None}
        found, gradients = relay_gradient(trainer, experience)
        assert found == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-5)
        assert gradients.keys() == expected.keys()
        assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, **TOLERANCE)
