"""The fair baselines of PPO: when their stages run, and how long SFT has to train."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from demo_run import complete, recipe_with

from pipeline.recipe import RecipeError
from pipeline.rewards import RewardConfig, build_rewards
from pipeline.stages import baselines
from pipeline.stages.baselines import evaluate_as_ppo, scaled_as_in_ppo, sft_keys, stretched, time_factor
from pipeline.stages.directory import RunDirectory
from pipeline.stages.engines import engine_problem
from pipeline.stages.fingerprint import needed_stages, stage_settings, stage_status
from pipeline.stages.launch import stage_command
from pipeline.stages.plan import missing_input, plan_stages
from pipeline.trainers.ppo.config import PPOConfig

BOTH = "eval.baselines=[sft_by_metric, sft_longer]"


def write_times(run: RunDirectory, sft: list[float], ppo: dict) -> None:
    for directory in (run.sft, run.ppo):
        directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": number, "seconds": seconds}) for number, seconds in enumerate(sft)]
    (run.sft / "timing.jsonl").write_text("\n".join(lines))
    (run.ppo / "stage.json").write_text(json.dumps(ppo))


def test_the_baselines_are_stages_between_ppo_and_the_report():
    def stages(*overrides: str) -> list[str]:
        return [planned.stage for planned in plan_stages(recipe_with(*overrides), None, None, force=False)]

    assert stages() == ["sft", "ppo", "eval"]
    assert stages(BOTH, "control=true") == ["sft", "ppo", "control", "sft_by_metric", "sft_longer", "eval"]
    assert stages("eval.baselines=[sft_longer]") == ["sft", "ppo", "sft_longer", "eval"]
    with pytest.raises(RecipeError, match=r"sft_longer: this recipe does not run that stage: .*eval\.baselines"):
        plan_stages(recipe_with(), "sft_longer", None, force=False)
    command = stage_command("sft_longer", Path("recipe.yaml"), [], [])
    assert command[-3:] == ["recipe.yaml", "--stage", "sft_longer"] and command[-4].endswith("sft.py")


def test_what_a_baseline_depends_on():
    recipe = recipe_with(BOTH)
    for stage in ("sft", "ppo"):  # finished stages stay finished where baselines are added
        assert stage_settings(recipe, stage) == stage_settings(recipe_with(), stage)
    assert stage_settings(recipe, "sft_longer") == stage_settings(recipe, "sft")
    assert stage_settings(recipe, "sft_by_metric") == stage_settings(recipe, "ppo")
    assert needed_stages(recipe, "sft_longer") == ["sft", "ppo"]
    assert needed_stages(recipe, "eval") == ["sft", "ppo", "sft_by_metric", "sft_longer"]
    complete(recipe, "sft", "ppo", "sft_by_metric", "sft_longer", "eval")
    run = RunDirectory.of(recipe)
    assert stage_status(run, recipe, "eval") == "complete"
    record = run.ppo / "stage.json"
    record.write_text(record.read_text().replace('"seconds": ', '"seconds": 1'))  # PPO took another time
    assert stage_status(run, recipe, "sft_longer") == "changed"
    assert stage_status(run, recipe, "sft_by_metric") == "complete"


def test_rewards_are_scaled_as_in_ppo():
    recipe = recipe_with("eval.baselines=[sft_by_metric]", "ppo.rewards=[{name: bleu, score_scaling: reference}, ter]")
    assert needed_stages(recipe, "sft_by_metric") == ["sft", "ppo"]
    rewards = build_rewards(recipe.ppo.rewards)
    run = RunDirectory.of(recipe)
    for step, deviation in ((2, 0.25), (10, 0.5)):
        folder = run.ppo / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"reward_deviations": {"bleu": deviation}}))
    assert [reward.weight for reward in scaled_as_in_ppo(rewards, run)] == [2.0, 1.0]


def test_the_report_waits_for_the_baselines():
    recipe = recipe_with("eval.baselines=[sft_longer]")
    complete(recipe, "sft", "ppo")
    assert "no finished sft_longer stage" in missing_input(recipe, "eval")
    assert "relay run recipe.yaml" in missing_input(recipe, "eval")
    assert missing_input(recipe, "eval").endswith("--only sft_longer")


def test_sft_is_stretched_to_the_time_of_sft_and_ppo():
    run = RunDirectory.of(recipe_with())
    write_times(run, [5.0, 20.0], {"seconds": 50.0})
    assert time_factor(run) == 3.5  # (20 + 50) / 20: what comes before the first step is not stretched
    assert sft_keys(recipe_with(BOTH), run, "sft_longer")["num_train_epochs"] == 7.0  # of 2
    write_times(run, [5.0, 15.0, 4.0, 10.0], {"seconds": 50.0})  # 15 seconds, an interruption, 10 seconds
    assert time_factor(run) == 3.0
    for sft, ppo in (([], {"seconds": 50.0}), ([5.0], {})):
        write_times(run, sft, ppo)
        with pytest.raises(ValueError, match=r"timing\.jsonl and .*ppo/stage\.json"):
            time_factor(run)


def test_the_schedule_is_stretched_as_a_whole():
    assert stretched({"num_train_epochs": 3, "warmup_steps": 50}, 2.5) == {
        "num_train_epochs": 7.5,
        "warmup_steps": 125,
    }
    assert stretched({"max_steps": 100, "warmup_steps": 0.1}, 2.5) == {"max_steps": 250, "warmup_steps": 0.1}
    assert stretched({}, 2.0) == {"num_train_epochs": 6.0}  # TRL's default is 3


def test_all_checkpoints_are_kept_where_one_of_them_is_chosen():
    keys = sft_keys(recipe_with(BOTH, "sft.save_total_limit=1"), RunDirectory(Path("none")), "sft_by_metric")
    assert keys["save_total_limit"] is None and keys["num_train_epochs"] == 2
    assert keys["load_best_model_at_end"] is False
    assert sft_keys(recipe_with(BOTH), RunDirectory(Path("none")), "sft") == recipe_with().sft.arguments


def test_an_engine_that_shards_trains_the_longer_sft_alone():
    assert engine_problem("sft_longer", "FSDP") is None
    assert "sft_by_metric: FSDP shards the model" in engine_problem("sft_by_metric", "FSDP")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.baselines=[sft_best]"], "eval.baselines: .*sft_by_metric, sft_longer.*'sft_best'"),
        (["eval.baselines=[sft_longer, sft_longer]"], "eval.baselines: .*at most once"),
        ([BOTH, "eval.systems=[base, sft]"], "eval.baselines: .*eval.systems must have ppo"),
        ([BOTH, "ppo.sft_model_path=elsewhere"], "eval.baselines: .*remove ppo.sft_model_path"),
        ([BOTH, "sft.save_strategy=no", "sft.eval_strategy=no"], "eval.baselines: .*sft.save_strategy"),
        (["eval.hyperparameters=testing"], "eval.hyperparameters: .*validation, test, not tuned.*'testing'"),
    ],
)
def test_baselines_that_cannot_be_made_are_refused(overrides, words):
    with pytest.raises(RecipeError, match=words):
        recipe_with(*overrides)


def test_a_checkpoint_is_evaluated_in_the_precision_of_ppo(
    taught_directory, model_config, examples, monkeypatch, fresh_accelerate
):
    """SFT's trainer has given accelerate its own, which stays for the life of the process."""
    Accelerator(mixed_precision="bf16", cpu=True)
    seen, write = [], baselines.generate

    def generate(*given):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return write(*given)

    monkeypatch.setattr(baselines, "generate", generate)
    monkeypatch.setattr(baselines, "held_out_metrics", lambda *_: None)
    task = SimpleNamespace(validation=examples.select(range(2)), strip_thoughts=False)
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        settings = PPOConfig(rewards=(RewardConfig("constant"),), bf16=bf16, response_length=4)
        recipe = SimpleNamespace(ppo=settings, model=model_config, seed=0)
        figures = evaluate_as_ppo(recipe, task, build_rewards(settings.rewards), taught_directory, taught_directory)
        assert seen.pop() == dtype and figures["eval_reward"] == figures["eval_reward/constant"]
