"""Algorithms by name: what each one sets, what it refuses, and REINFORCE's gradient worked out by hand."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import tensor

from pipeline.models.sequences import Sequences
from pipeline.models.shared import PolicyOutputs
from pipeline.recipe import RecipeError, load_recipe
from pipeline.recipe.load import recipe_values
from pipeline.stages.plan import ppo_sizes
from pipeline.trainers.ppo.advantages import estimate_advantages, group_deviation, loss_weights
from pipeline.trainers.ppo.algorithms import ALGORITHMS
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.objective import Clipping, importance_ratio, ppo_loss
from pipeline.trainers.ppo.rollout import Rollout
from pipeline.trainers.ppo.scores import RunningMoments

RECIPE = """name: demo
model: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400}}
task: {name: parallel, source: "{split}.en", target: "{split}.de"}
ppo:
  rewards: [chrf]
  response_length: 8
"""


def read(tmp_path, text: str, *overrides: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE + text)
    return load_recipe(file, overrides)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_sets_its_keys_in_python_and_in_a_recipe(tmp_path, name):
    from_python, recipe = PPOConfig(algorithm=name), read(tmp_path, f"  algorithm: {name}\n")
    for key, value in (*ALGORITHMS[name].defines.items(), *ALGORITHMS[name].suggests.items()):
        assert getattr(from_python, key) == getattr(recipe.ppo, key) == value, key
    shown = ppo_sizes(recipe, 1)
    assert f"algorithm {name}: " in shown and "kl_placement" in shown


def test_a_suggestion_may_be_changed_even_to_the_default(tmp_path):
    default = PPOConfig().kl_coef
    assert default != ALGORITHMS["dapo"].suggests["kl_coef"]
    assert PPOConfig(algorithm="dapo", kl_coef=default).kl_coef == default
    recipe = read(tmp_path, f"  algorithm: dapo\n  kl_coef: {default}\n", "ppo.num_generations=2")
    assert (recipe.ppo.kl_coef, recipe.ppo.num_generations) == (default, 2)


def test_a_contradiction_is_one_sentence_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"^ppo\.lam: .*algorithm grpo defines it as 1\.0.*found 0\.95$"):
        PPOConfig(algorithm="grpo", lam=0.95)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:8: ppo\.lam: .*algorithm grpo.*found 0\.95$"):
        read(tmp_path, "  algorithm: grpo\n  lam: 0.95\n")
    with pytest.raises(RecipeError, match=r"override 'ppo\.vf_coef=0\.5'.*ppo\.vf_coef: .*algorithm rloo"):
        read(tmp_path, "  algorithm: rloo\n", "ppo.vf_coef=0.5")
    assert PPOConfig(algorithm="grpo", lam=1.0).lam == 1.0  # the same value is none


def test_an_unknown_algorithm_is_refused_with_the_name_that_was_meant(tmp_path):
    with pytest.raises(RecipeError, match=r"ppo\.algorithm: .*did you mean 'grpo'"):
        read(tmp_path, "  algorithm: gprpo\n")


def test_the_former_key_for_whitening_names_the_new_one(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:7: ppo\.whiten_advantages: .*scale_rewards"):
        read(tmp_path, "  whiten_advantages: false\n")


def test_expanded_settings_stay_what_they_are_when_they_are_copied_or_saved(tmp_path):
    config = PPOConfig(algorithm="dapo", kl_coef=0.05)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert again == config
    assert replace(config, response_length=9).kl_coef == 0.05
    recipe = read(tmp_path, "  algorithm: dapo\n  kl_coef: 0.05\n")
    from ruamel.yaml import YAML

    saved = tmp_path / "saved.yaml"
    with saved.open("w") as file:
        YAML(typ="safe").dump(recipe_values(recipe), file)
    assert load_recipe(saved).ppo == recipe.ppo


def test_the_deviation_of_a_group_leaves_out_what_has_no_score():
    scores, scored = tensor([1.0, 3.0, 9.0, 2.0, 5.0, 5.0]), tensor([True, True, False, True, False, False])
    # of 1 and 3: sqrt((1 + 1) / 1); a score that is alone has none
    torch.testing.assert_close(group_deviation(scores, scored, 3), tensor([2.0**0.5] * 3 + [0.0] * 3))


def test_what_a_token_counts_in_the_loss():
    mask = tensor([[True, True, False, False], [True, True, True, True]])
    for loss_type, rows in {"dapo": (1, 1), "sum": (1, 1), "grpo": (1 / 2, 1 / 4), "dr_grpo": (1 / 8, 1 / 8)}.items():
        torch.testing.assert_close(loss_weights(mask, loss_type, 8), mask * tensor([[float(row)] for row in rows]))


def test_ratios_of_tokens_and_of_completions():
    mask = tensor([[True, True, False]])
    log_ratio = tensor([[0.2, 0.4, 0.0]])
    torch.testing.assert_close(importance_ratio(log_ratio, mask, "token"), log_ratio.exp())
    torch.testing.assert_close(importance_ratio(log_ratio, mask, "sequence"), tensor([[0.3]]).exp())
    torch.testing.assert_close(importance_ratio(log_ratio, mask, "completion"), tensor([[0.6]]).exp())


def rollout_of(ids, mask, scores, logprobs, values) -> Rollout:
    """A rollout of one-token prompts, whose scores are at the last tokens, and whose KL counts if `kl_coef` does."""
    count = len(ids)
    last_token = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])
    return Rollout(
        prompts=["p"] * count,
        completions=["c"] * count,
        finished=torch.ones(count, dtype=torch.bool),
        sequences=Sequences(ids[:, :1], torch.ones(count, 1, dtype=torch.bool), ids, mask),
        logprobs=logprobs,
        ref_logprobs=logprobs - 1,
        values=values,
        entropies=torch.zeros_like(values),
        rewards={},
        scores=scores,
        token_scores=last_token * scores.unsqueeze(1),
        scored=torch.ones(count, dtype=torch.bool),
        moments=RunningMoments(),
        failures=[],
    )


def test_the_value_function_may_learn_longer_returns_than_the_policy():
    """One-step advantages for the policy, and the whole return, which is the score 3, for the values."""
    mask, values = tensor([[True, True]]), tensor([[1.0, 2.0]])
    rollout = rollout_of(tensor([[4, 5]]), mask, tensor([3.0]), torch.zeros(1, 2), values)
    args = PPOConfig(lam=0.0, value_lam=1.0, kl_coef=0.0, scale_rewards="none")
    experience, _ = estimate_advantages(rollout, args.kl_coef, args, Accelerator(cpu=True))
    torch.testing.assert_close(experience.advantages, tensor([[2.0 - 1.0, 3.0 - 2.0]]))
    torch.testing.assert_close(experience.returns, tensor([[3.0, 3.0]]))
    same = estimate_advantages(rollout, 0.0, replace(args, value_lam=None), Accelerator(cpu=True))[0]
    torch.testing.assert_close(same.returns, tensor([[2.0, 3.0]]))  # one step: the next value, then the score


def test_reinforce_is_the_policy_gradient_with_discounted_returns():
    """A policy over two tokens at each of two positions; token 1 at the first ends the completion.

    The batch has each completion as often as it is probable, so that sums over it are exact expectations:
    P(1) = 1/4 at the first position, P(0) = 1/3 at the second: (1) x 3, (0, 0) x 3, (0, 1) x 6 of 12.
    Scores: 2 for (1), 1 for (0, 0), 4 for (0, 1). The discount is 0.5.

    d/d logits of position t is the mean of gamma^(T - t) x score x (one-hot - p), T the last position:
    first:  token 1 at its end: 3 x 2 x (-3/4, 3/4);  token 0 before another: 0.5 x (3 x 1 + 6 x 4) x (1/4, -1/4)
            = (-4.5 + 3.375, 4.5 - 3.375) / 12 = (-0.09375, 0.09375)
    second: 3 x 1 x (2/3, -2/3) + 6 x 4 x (-1/3, 1/3) = (2 - 8, 8 - 2) / 12 = (-0.5, 0.5)
    """
    logits = torch.log(tensor([[3 / 4, 1 / 4], [1 / 3, 2 / 3]], dtype=torch.float64)).requires_grad_()
    ids = tensor([[1, 0]] * 3 + [[0, 0]] * 3 + [[0, 1]] * 6)
    mask = tensor([[True, False]] * 3 + [[True, True]] * 9)
    scores = tensor([2.0] * 3 + [1.0] * 3 + [4.0] * 6, dtype=torch.float64)
    logprobs = torch.stack([logits.log_softmax(-1)[t, ids[:, t]] for t in (0, 1)], dim=1) * mask
    zeros = torch.zeros(12, 2, dtype=torch.float64)
    rollout = rollout_of(ids, mask, scores, logprobs.detach(), zeros)
    args = PPOConfig(algorithm="reinforce", gamma=0.5)
    experience, _ = estimate_advantages(rollout, args.kl_coef, args, Accelerator(cpu=True))
    terms = ppo_loss(PolicyOutputs(logprobs, zeros, zeros), experience, Clipping(args.cliprange, args.cliprange))
    (-terms.policy / experience.counts.sum()).backward()
    expected = tensor([[-0.09375, 0.09375], [-0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected)
