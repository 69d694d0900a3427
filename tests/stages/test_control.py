"""The control: which finished run is one, and which is refused."""

from pathlib import Path

from demo_run import complete, recipe_with

from pipeline.recipe import load_recipe
from pipeline.stages.control import control_kind, control_run
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import setting_differences, stage_fingerprint, stage_status
from pipeline.stages.plan import missing_input


def control_of(recipe, name: str, reward: str = "constant", *overrides: str) -> Path:
    """Finish a ppo stage rewarded by `reward` from this recipe's SFT model; return its run directory."""
    sft = RunDirectory.of(recipe).sft
    other = load_recipe(
        "recipe.yaml", [f"name={name}", f"ppo.sft_model_path={sft}", f"ppo.rewards=[{{name: {reward}}}]", *overrides]
    )
    complete(other, "ppo")
    return RunDirectory.of(other).path


def test_a_constant_reward_run_from_the_same_sft_model_is_the_control():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo", "eval")
    assert control_run(recipe) is None
    control_of(recipe, "rewarded", "ter")
    assert control_run(recipe) is None
    before = stage_fingerprint(recipe, "eval")
    assert stage_status(RunDirectory.of(recipe), recipe, "eval") == "complete"
    path = control_of(recipe, "control")
    assert control_run(recipe) == path == Path("runs/control")
    assert stage_fingerprint(recipe, "eval") != before  # the report is to be made again, with the control
    assert setting_differences(RunDirectory.of(recipe), recipe, "eval") == ["control: not there before"]
    assert control_run(recipe_with("eval.control=null")) is None
    assert control_run(recipe_with("eval.systems=[base, sft]")) is None
    complete(recipe, "sft")  # other weights: what started from the old ones is no control of them
    (RunDirectory.of(recipe).sft / "stage.json").write_text('{"stage": "sft"}')
    assert control_run(recipe) is None


def test_a_run_with_shuffled_scores_of_the_same_rewards_is_the_better_control():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo")
    control_of(recipe, "other", "ter", "ppo.shuffle_scores=true")
    assert control_run(recipe) is None
    constant = control_of(recipe, "constant")
    assert control_run(recipe) == constant and control_kind(constant / "ppo") == "a constant reward"
    shuffled = control_of(recipe, "shuffled", "bleu", "ppo.shuffle_scores=true", "seed=7")
    control_of(recipe, "later")
    assert control_run(recipe) == shuffled and control_kind(shuffled / "ppo") == "shuffled scores"
    assert control_run(recipe_with("ppo.shuffle_scores=true")) is None


def test_a_control_that_is_named_has_to_be_one():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo")

    def problem(name: str) -> str | None:
        return missing_input(recipe_with(f"eval.control=runs/{name}"), "eval")

    assert "eval.control: 'runs/none' is no run directory" in problem("none")
    control_of(recipe_with("name=elsewhere"), "control")
    assert "'runs/control' did not start from the SFT model" in problem("control")
    path = control_of(recipe, "rewarded", "ter")  # a control that is named may have any reward
    assert problem("rewarded") is None
    assert control_run(recipe_with("eval.control=runs/rewarded")) == path
    assert missing_input(recipe_with("eval.control=runs/none", "eval.systems=[sft]"), "eval") is None
