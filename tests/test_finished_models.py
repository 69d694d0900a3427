"""Finished models are evaluated without training anything: `eval.systems` alone is a recipe."""

import json

import pytest

from pipeline import eval as eval_stage
from pipeline.recipe import load_recipe
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import needed_stages
from pipeline.stages.plan import missing_input, plan_stages
from tests.faults.tiny_run import tiny_recipe

EVAL = {
    "metrics": ["token_f1"],
    "n_bootstrap": 1000,
    "samples_per_prompt": 2,
    "sample_prompts": 2,
    "max_new_tokens": 4,
}


@pytest.fixture
def alone(tmp_path, base_directory, taught_directory):
    """A recipe of two finished models, without sections for stages that train."""
    path = tiny_recipe(tmp_path, model={"model_name_or_path": str(base_directory)})
    recipe = json.loads(path.read_text())
    recipe["model"].pop("from_scratch")
    systems = [{"name": "a", "path": str(base_directory)}, {"name": "b", "path": str(taught_directory)}]
    recipe = {key: recipe[key] for key in ("name", "output_dir", "model", "task")} | {
        "eval": EVAL | {"systems": systems}
    }
    path.write_text(json.dumps(recipe))
    return path


def test_systems_alone_are_a_recipe(alone, fresh_accelerate):
    recipe = load_recipe(alone)
    plan = {planned.stage: planned.action for planned in plan_stages(recipe, None, None, False)}
    assert plan == {"sft": "not needed", "ppo": "not needed", "eval": "run"}
    assert eval_stage.main([str(alone)]) == 0
    run = RunDirectory.of(recipe)
    report = json.loads((run.eval / "report.json").read_text())
    assert [(c["a"], c["b"]) for c in report["comparisons"]] == [("a", "b")]
    assert "token_f1" in report["verdict"] and " a" in report["verdict"] and "SFT" not in report["verdict"]
    assert report["systems"]["a"]["kl_to_sft"] is None
    assert "token_f1" in (run.eval / "report.html").read_text()
    assert load_recipe(run.path / "recipe.yaml") == recipe  # without a section sft
    assert {path.name for path in run.path.iterdir() if path.is_dir()} == {"eval"}


def test_what_reads_an_sft_model_needs_it(alone):
    def stages(*overrides):
        return needed_stages(load_recipe(alone, overrides), "eval")

    ppo = "ppo={rewards: [token_f1]}"
    assert stages() == [] and stages("sft={}") == [] and stages(ppo) == []  # as with --only eval
    assert stages("eval.systems=[base]") == []
    assert stages("eval.systems=[sft]") == ["sft"]
    assert stages("eval.systems=[ppo]", ppo) == ["sft", "ppo"]
    learned = "ppo={rewards: [learned], reward_model_path: elsewhere}"
    assert stages(learned) == ["sft"]  # the adapter's base
    assert missing_input(load_recipe(alone), "eval") is None
    assert "no finished sft stage" in missing_input(load_recipe(alone, ["eval.systems=[sft]"]), "eval")
    assert plan_stages(load_recipe(alone, ["sft={}"]), None, None, False)[0].action == "run"  # it was asked for


def test_one_system_has_nothing_to_be_compared_with(alone, fresh_accelerate):
    system = json.loads(alone.read_text())["eval"]["systems"][0]
    assert eval_stage.main([str(alone), f"eval.systems=[{{name: a, path: {system['path']}}}]"]) == 0
    run = RunDirectory.of(load_recipe(alone))
    assert "nothing to compare" in json.loads((run.eval / "report.json").read_text())["verdict"]
