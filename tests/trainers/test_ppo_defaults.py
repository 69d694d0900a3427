"""What a run does where its settings say nothing."""

import pytest
import torch
from ppo_toys import colours, training_steps, weights
from torch import tensor

from pipeline.models.generation import Completions
from pipeline.rewards import RewardOutputs
from pipeline.trainers.ppo.advantages import compute_gae
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.scores import RunningMoments, process_scores

NONE = {"learning_rate": None, "value_learning_rate": None}
KEYS = ("score_scaling", "missing_eos_penalty", "kl_coef", "num_ppo_epochs", "adam_epsilon", "dual_clip")
DEFAULTS = {key: getattr(PPOConfig, key) for key in KEYS}


def rates(trainer) -> list[float]:
    """The learning rates of the policy and of the value function."""
    return [group["initial_lr"] for group in trainer.optimizer.param_groups]


def test_the_first_token_of_a_long_completion_sees_the_whole_score():
    rewards = torch.zeros(1, 256)
    rewards[0, -1] = 1.0
    mask, zeros = torch.ones(1, 256, dtype=torch.bool), torch.zeros(1, 256)
    args = PPOConfig()
    advantages, _ = compute_gae(rewards, zeros, mask, args.gamma, args.lam)
    assert advantages[0, 0] == 1.0
    decayed, _ = compute_gae(rewards, zeros, mask, args.gamma, 0.95)
    assert decayed[0, 0] < 1e-5


@pytest.mark.parametrize(("use_peft", "policy"), [(True, 3e-5), (False, 1e-6)])
def test_the_learning_rate_goes_by_what_is_trained(make_trainer, use_peft, policy):
    assert rates(make_trainer("default", use_peft=use_peft, **NONE)) == pytest.approx([policy, 10 * policy])


def test_learning_rates_that_are_set_count(make_trainer):
    assert rates(make_trainer("policy", learning_rate=1e-3, value_learning_rate=None)) == pytest.approx([1e-3, 1e-2])
    assert rates(make_trainer("both", learning_rate=1e-3, value_learning_rate=4e-3)) == pytest.approx([1e-3, 4e-3])


def test_the_scale_of_the_rewards_changes_nothing(make_trainer):
    def hundredfold(prompts, completions, **columns):
        return [100 * reward for reward in colours(prompts, completions)]

    trained = []
    for name, reward in (("one", colours), ("hundred", hundredfold)):
        trainer = make_trainer(name, reward=reward, **DEFAULTS)
        trainer.train()
        trained.append(weights(trainer))
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.1], [-30.0, -30.0, -10.0], [3000.0, 3000.0, 0.0]])
def test_an_unfinished_completion_scores_one_deviation_lower(rewards, make_trainer):
    finished = [True, False, True]
    completions = Completions(ids=[[1, 2]] * 3, texts=["", "", ""], finished=tensor(finished))
    outputs = RewardOutputs(tensor(rewards), {"reward": tensor(rewards)}, {})
    token_scores = torch.zeros(3, 2)
    token_scores[:, 1] = tensor(rewards)
    accelerator = make_trainer("any").accelerator
    result = process_scores(outputs, token_scores, completions, RunningMoments(), PPOConfig(), accelerator, 0)
    assert float(result.scores[0] - result.scores[1]) == pytest.approx(1.0, abs=1e-4)


def test_a_group_baseline_has_no_value_function(make_trainer):
    heads = {}
    for name, settings in (("alone", {}), ("group", {"num_generations": 2, "group_baseline": True})):
        trainer = make_trainer(name, **settings)
        trainer.train()
        heads[name] = weights(trainer)["value_head.weight"]
    assert heads["alone"].any() and not heads["group"].any()


def test_one_pass_over_a_rollout_and_adam_as_everywhere(make_trainer):
    trainer = make_trainer(**DEFAULTS)
    trainer.train()
    assert [step["policy/optimizer_steps"] for step in training_steps(trainer.output_dir)] == [1.0, 1.0, 1.0]
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-8}
    assert trainer.learner.clipping.dual == 3.0


def test_the_length_comes_from_the_references(make_trainer, examples):
    rows = examples.map(lambda row: {"references": ["red red red red red red red red red"]})
    trainer = make_trainer(train=rows, response_length=None)
    assert trainer.args.response_length == 16  # nine words and EOS
    trainer.train()
    assert max(line["objective/length"] for line in training_steps(trainer.output_dir)) > 4
    bare = examples.select_columns("prompt")
    with pytest.raises(ValueError, match=r"^ppo\.response_length: missing"):
        make_trainer(train=bare, response_length=None)
