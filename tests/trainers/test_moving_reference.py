"""A reference that follows the policy."""

import shutil

import pytest
import torch
from ppo_toys import training_steps, weights
from torch import nn

from pipeline.trainers.ppo.moving_reference import MovingReference

MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2, "kl_coef": 0.5}


def test_it_is_mixed_by_hand():
    policy = nn.Parameter(torch.tensor([1.0, 2.0]))
    reference = MovingReference([policy])
    with torch.no_grad():
        policy += 10.0
    reference.mix(0.25)  # 0.75 x 1 + 0.25 x 11
    with reference.in_place():
        assert policy.tolist() == [3.5, 4.5]
    assert policy.tolist() == [11.0, 12.0]
    assert {name: w.tolist() for name, w in reference.named_weights().items()} == {"moving_reference.0": [3.5, 4.5]}
    reference.mix(1.0)
    assert reference.weights[0].tolist() == [11.0, 12.0]


@pytest.mark.filterwarnings("ignore:.*bf16")
@pytest.mark.parametrize("bf16", [False, True])  # autocast keeps its casts of weights, which change here meanwhile
@pytest.mark.parametrize("use_peft", [True, False])
def test_the_kl_starts_anew_where_it_becomes_the_policy(make_trainer, use_peft, bf16):
    trainer = make_trainer(total_episodes=40, use_peft=use_peft, bf16=bf16, **MOVING)
    trainer.train()
    kls = [line["objective/kl"] for line in training_steps(trainer.output_dir)]
    assert [kl == 0 for kl in kls] == [True, False, True, False, True]
    fixed = make_trainer("fixed", total_episodes=40, use_peft=use_peft, bf16=bf16, kl_coef=0.5)
    fixed.train()
    assert [line["objective/kl"] == 0 for line in training_steps(fixed.output_dir)] == [True] + [False] * 4


def test_before_it_moves_it_is_the_reference(make_trainer):
    lines = []
    for name, settings in (("fixed", {"kl_coef": 0.5}), ("moving", {**MOVING, "ref_model_sync_steps": 3})):
        trainer = make_trainer(name, total_episodes=40, **settings)
        trainer.train()
        lines.append(training_steps(trainer.output_dir))
    for fixed, moving in list(zip(*lines, strict=True))[:3]:
        assert moving["loss/policy_avg"] == pytest.approx(fixed["loss/policy_avg"], rel=1e-3, abs=1e-5)
    assert [moving["objective/kl"] == 0 for moving in lines[1]] == [True, False, False, True, False]


def test_a_resumed_run_has_the_reference_of_its_step(make_trainer):
    states = []
    for _ in range(2):
        trainer = make_trainer(total_episodes=40, save_steps=1, save_total_limit=5, **MOVING)
        trainer.train(resume_from_checkpoint=True)
        states.append({name: weight.tolist() for name, weight in weights(trainer).items()})
        for step in (4, 5):
            shutil.rmtree(trainer.checkpoints / f"checkpoint-{step}")
    assert states[0] == states[1]


def test_the_best_policy_is_restored_without_it(make_trainer, examples):
    trainer = make_trainer(total_episodes=24, eval_steps=1, validation=examples.select(range(6)), **MOVING)
    state = trainer.train()
    assert state.step == 3 and all(not name.startswith("moving") for name in weights(trainer))
