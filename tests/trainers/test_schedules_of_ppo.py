"""Temperature, entropy bonus and weights of rewards that change with the episodes."""

import shutil

import pytest
from ppo_toys import COLOURS, NUMBERS, weights

from pipeline.recipe import load_recipe
from pipeline.rewards import Reward, build_rewards
from pipeline.trainers.ppo.config import PPOConfig


def count(words):
    return lambda prompts, completions, **columns: [float(sum(w in words for w in c.split())) for c in completions]


TWO = (
    Reward("colours", count(COLOURS)),
    Reward("numbers", count(NUMBERS), 2.0, weight_schedule=((0, 0.0), (16, 2.0))),
)


def test_each_step_has_its_own_values(make_trainer):
    trainer = make_trainer(
        reward=TWO, temperature=((0, 1.0), (16, 0.5)), entropy_coef=((0, 0.0), (16, 0.2)), total_episodes=24
    )
    seen = []
    for step in range(3):
        rollout = trainer.collect_rollout(trainer.prompt_rows(step))
        experience, stats = trainer.compute_advantages(rollout)
        weight = step  # 0, 1, 2
        expected = rollout.rewards["colours"] + weight * rollout.rewards["numbers"]
        assert rollout.scores.tolist() == expected.tolist()
        seen.append((trainer.shared.temperature, trainer.learner.entropy_coef))
        trainer.advance(rollout, stats | trainer.update(experience))
    assert seen == [(1.0, 0.0), (0.75, 0.1), (0.5, 0.2)]
    assert trainer.shared.entropy_gradient


def test_held_out_completions_are_compared_by_the_last_weights(make_trainer, examples):
    trainer = make_trainer(reward=TWO, validation=examples.select(range(4)))
    values = trainer.evaluate()
    expected = values["eval_reward/colours"] + 2 * values["eval_reward/numbers"]
    assert values["eval_reward"] == pytest.approx(expected)


def test_a_run_goes_on_with_the_values_of_its_step(make_trainer):
    settings = {"reward": TWO, "temperature": ((0, 1.0), (16, 0.5)), "entropy_coef": ((0, 0.1), (24, 0.0))}
    states = []
    for _ in range(2):
        trainer = make_trainer(save_steps=1, save_total_limit=3, **settings)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.step == 3
        states.append({name: tensor.tolist() for name, tensor in weights(trainer).items()})
        shutil.rmtree(trainer.checkpoints / "checkpoint-3")
    assert states[0] == states[1]


def test_a_constant_schedule_changes_nothing(make_trainer):
    runs = [
        make_trainer(name, total_episodes=16, temperature=temperature, entropy_coef=0.1)
        for name, temperature in (("number", 0.7), ("points", ((0, 0.7), (8, 0.7))))
    ]
    for trainer in runs:
        trainer.train()
    states = [{name: tensor.tolist() for name, tensor in weights(trainer).items()} for trainer in runs]
    assert states[0] == states[1]


def test_schedules_are_read_from_a_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: demo\n"
        "model: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400}}\n"
        'task: {name: parallel, source: "{split}.en", target: "{split}.de"}\n'
        "ppo:\n"
        "  rewards: [{name: chrf, weight: [[0, 1], [100, 0.5]]}, {name: constant, weight: 2}]\n"
        "  temperature: [[0, 1.0], [1000, 0.5]]\n"
        "  response_length: 8\n"
    )
    ppo = load_recipe(file).ppo
    assert ppo.temperature == ((0, 1.0), (1000, 0.5))
    assert [(r.weight, r.weight_schedule) for r in build_rewards(ppo.rewards)] == [
        (0.5, ((0, 1), (100, 0.5))),
        (2.0, None),
    ]
    assert ppo.sampling.temperature == 1.0 and ppo.sampling_at(500).temperature == 0.75
    with pytest.raises(ValueError, match=r"ppo\.temperature: .*must rise"):
        PPOConfig(temperature=((0, 1.0), (0, 0.5)))
    with pytest.raises(ValueError, match=r"ppo\.rewards: the weight of 'chrf'.*rise"):
        load_recipe(file, ["ppo.rewards.0.weight=[[5, 1], [1, 2]]"])
