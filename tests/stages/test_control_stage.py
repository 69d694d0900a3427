"""`control: true`: PPO once more with shuffled scores, as a stage of its own."""

import json
from pathlib import Path

import pytest
from demo_run import complete, recipe_with, write_demo

from pipeline.recipe import RecipeError, load_checked_recipe, load_recipe, recipe_values
from pipeline.stages.control import control_kind, control_policy, ppo_arguments
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import needed_stages, setting_differences, stage_settings, stage_status
from pipeline.stages.launch import stage_command
from pipeline.stages.plan import missing_input, plan_stages


def planned(recipe, only=None, start=None) -> dict[str, str]:
    return {stage.stage: stage.action for stage in plan_stages(recipe, only, start, force=False)}


def test_the_control_is_a_stage_after_ppo():
    assert "control" not in planned(recipe_with())
    recipe = recipe_with("control=true")
    assert list(planned(recipe)) == ["sft", "ppo", "control", "eval"]
    assert planned(recipe, only="control")["control"] == "run"
    assert planned(recipe, start="control") == {
        "sft": "not selected",
        "ppo": "not selected",
        "control": "run",
        "eval": "run",
    }
    with pytest.raises(RecipeError, match=r"control: this recipe does not run that stage: .*control: true"):
        plan_stages(recipe_with(), "control", None, force=False)
    command = stage_command("control", Path("recipe.yaml"), ["control=true"], ["--cpu"])
    assert command[-4:] == ["recipe.yaml", "control=true", "--stage", "control"] and command[-5].endswith("ppo.py")


def test_the_control_has_the_settings_of_ppo_but_for_the_order_of_the_scores():
    recipe = recipe_with("control=true")
    ppo, control = (stage_settings(recipe, stage) for stage in ("ppo", "control"))
    assert {key for key in ppo if ppo[key] != control[key]} == {"ppo.shuffle_scores"} and ppo.keys() == control.keys()
    assert ppo_arguments(recipe, "control").shuffle_scores and not ppo_arguments(recipe, "ppo").shuffle_scores
    assert stage_settings(recipe_with(), "ppo") == ppo  # finished stages stay finished
    assert needed_stages(recipe, "control") == needed_stages(recipe, "ppo") == ["sft"]


def test_the_report_needs_the_control_and_shows_it():
    recipe = recipe_with("control=true")
    complete(recipe, "sft", "ppo")
    assert "no finished control stage" in missing_input(recipe, "eval")
    assert missing_input(recipe, "eval").endswith("relay run recipe.yaml control=true --only control")
    complete(recipe, "control", "eval")
    policy = control_policy(recipe)
    assert policy == RunDirectory.of(recipe).control and control_kind(policy) == "shuffled scores"
    run = RunDirectory.of(recipe)
    assert stage_status(run, recipe, "eval") == "complete"
    assert "control: true -> (not set)" in setting_differences(run, recipe_with(), "eval")
    changed = recipe_with("control=true", "ppo.kl_coef=0.2")
    assert planned(changed)["control"] == "run"
    assert control_policy(recipe_with("control=true", "eval.systems=[base, sft]")) is None


def test_the_saved_recipe_says_control(tmp_path):
    recipe = recipe_with("control=true")
    file = RunDirectory(tmp_path / "saved").save_recipe(recipe)
    assert load_recipe(file) == recipe and recipe.control
    assert "control" not in recipe_values(recipe_with())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.shuffle_scores=true"], "control: .*ppo.shuffle_scores"),
        (["ppo.reward_shaping=prefix"], "control: .*ppo.reward_shaping: none"),
        (["eval.control=runs/other"], "eval.control: .*control: true"),
        (["ppo=null"], "control: .*ppo section"),
    ],
)
def test_what_no_control_can_be_made_of_is_refused(overrides, words):
    with pytest.raises(RecipeError, match=words):
        recipe_with("control=true", *overrides)


def test_a_shuffled_reward_is_told_how_to_say_it():
    with pytest.raises(RecipeError, match=r"ppo.rewards: 'shuffled'.*control: true.*ppo.shuffle_scores: true"):
        load_checked_recipe("recipe.yaml", ["ppo.rewards=[bleu, shuffled]"], 1)


def test_a_stage_json_of_ppo_is_untouched_by_the_control():
    write_demo()
    recipe = recipe_with("control=true")
    complete(recipe, "sft", "ppo", "control")
    record = json.loads((RunDirectory.of(recipe).ppo / "stage.json").read_text())
    assert record["settings"]["ppo.shuffle_scores"] is False
