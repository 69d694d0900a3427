"""Where completions end when the recipe leaves it to the data, and what the plan says of PPO's settings."""

import pytest
from demo_run import recipe_with

from pipeline import run
from pipeline.recipe import RecipeError
from pipeline.rewards import RewardConfig
from pipeline.stages.directory import RunDirectory
from pipeline.stages.lengths import missing_length
from pipeline.stages.ppo_plan import ppo_choices, ppo_notes
from pipeline.stages.task import load_recipe_task
from pipeline.trainers.ppo.config import PPOConfig

FREE = "ppo.response_length=null"
LEARNED = (RewardConfig("learned"),)


def loaded(*overrides):
    recipe = recipe_with(*overrides)
    return load_recipe_task(recipe, RunDirectory.of(recipe))[0]


def test_every_length_follows_the_references(capfd):
    pairs = "reward={pairs: {from: sft}}"
    recipe = recipe_with(FREE, pairs)
    assert missing_length(recipe) == "ppo.response_length"
    whole = loaded(FREE, pairs)
    assert whole.ppo.response_length == whole.eval.max_new_tokens == whole.reward.pairs.max_new_tokens == 8
    assert "ppo.response_length: 8, by the length of the references (99% fit" in capfd.readouterr().err


def test_lengths_that_are_set_stay(capfd):
    whole = loaded(FREE, "eval.max_new_tokens=5", "reward={pairs: {from: sft, max_new_tokens: 6}}")
    assert (whole.ppo.response_length, whole.eval.max_new_tokens, whole.reward.pairs.max_new_tokens) == (8, 5, 6)
    capfd.readouterr()
    assert missing_length(recipe_with()) is None and loaded().ppo.response_length == 8
    assert "by the length" not in capfd.readouterr().err


def test_an_evaluation_alone_has_a_length_too():
    assert loaded("ppo=null", "eval.systems=[base, sft]").eval.max_new_tokens == 8


def test_the_plan_shows_what_ppo_uses(taught_directory, capsys):
    recipe = recipe_with(FREE)
    assert ppo_choices(recipe).startswith("learning_rate 3e-05 (LoRA), value function 0.0003 (vf_coef 0.1); ")
    assert "once they are loaded" in ppo_choices(recipe)  # the tokenizer is not built yet
    external = recipe_with(FREE, f"ppo.sft_model_path={taught_directory}", "ppo.use_peft=false")
    assert "learning_rate 1e-06 (all weights)" in ppo_choices(external)
    assert ppo_choices(external).endswith("response_length 8, by the length of the references")
    with pytest.raises(RecipeError, match="must be below the 10"):
        ppo_choices(recipe_with(FREE, f"ppo.sft_model_path={taught_directory}", "task.ppo_examples=99"))
    group = recipe_with("ppo.group_baseline=true", "ppo.num_generations=2")
    assert "no value function; response_length 8" in ppo_choices(group)
    assert run.main(["recipe.yaml", FREE, "ppo.num_ppo_epochs=4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "ppo: learning_rate 3e-05" in shown and "ppo.num_ppo_epochs: 4 passes" in shown


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({"num_ppo_epochs": 3}, True),
        ({"num_ppo_epochs": 3, "target_kl": 0.01}, False),
        ({"num_ppo_epochs": 2}, False),
    ],
)
def test_many_passes_want_a_target(settings, noted):
    assert [note[:19] for note in ppo_notes(PPOConfig(**settings), "bleu")] == ["ppo.num_ppo_epochs:"] * noted


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({}, True),
        ({"metric_for_best_model": "eval_bleu"}, False),
        ({"load_best_model_at_end": False}, False),
        ({"rewards": (*LEARNED, RewardConfig("bleu"))}, False),
    ],
)
def test_a_learned_reward_should_not_choose_the_policy(settings, noted):
    notes = ppo_notes(PPOConfig(**{"rewards": LEARNED, **settings}), "chrf")
    assert [("ppo.metric_for_best_model" in note, "eval_chrf" in note) for note in notes] == [(True, True)] * noted
