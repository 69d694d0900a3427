"""What stages and commands take of a run that has changed since, and of models at a revision."""

import errno
import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest
from demo_run import complete, recipe_with

from pipeline.cli.finished_models import find_model, prompt_from, report_of
from pipeline.models import hub
from pipeline.models.config import ModelConfig
from pipeline.stages import model_cards
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import external_models, stage_settings
from pipeline.stages.lock import run_lock
from pipeline.stages.model_cards import write_model_cards


def changed(stage: str, *overrides: str, common: tuple[str, ...] = ()) -> bool:
    before, after = recipe_with(*common), recipe_with(*common, *overrides)
    return stage_settings(before, stage) != stage_settings(after, stage)


def test_best_of_n_depends_on_what_scores_its_samples():
    model = "model={model_name_or_path: org/model}"
    common = (model, "sft={from: best_of_n}", "ppo.rewards=[bleu]")
    assert changed("sft", "ppo.rewards=[chrf]", common=common) and changed(
        "sft", "ppo.stop_strings=[x]", common=common
    )
    assert not changed("sft", "ppo.kl_coef=1", common=common)
    assert not changed("sft", "ppo.rewards=[chrf]")


def test_a_metric_that_chooses_the_checkpoint_is_a_setting_of_ppo():
    wer = "eval.metrics=[bleu, {name: wer, normalizer: NAME}]"
    chooses = ("ppo.metric_for_best_model=eval_wer", "ppo.greater_is_better=false", wer.replace("NAME", "basic"))
    assert changed("ppo", wer.replace("NAME", "english"), common=chooses)
    assert not changed("ppo", wer.replace("NAME", "english"), common=(wer.replace("NAME", "basic"),))


def test_the_template_of_a_classifier_is_a_setting_of_the_stage_that_calibrates_it():
    common = ("reward={model: org/classifier}", "ppo.rewards=[learned]")
    assert changed("reward", "ppo.rewards=[{name: learned, template: '{prompt} {completion}'}]", common=common)


def test_a_policy_is_not_offered_over_another_sft_model():
    recipe = recipe_with()
    run = RunDirectory.of(recipe)
    complete(recipe, "sft", "ppo", "eval")
    (run.path / "recipe.yaml").write_text(Path("recipe.yaml").read_text())
    (run.eval / "report.json").write_text("{}")
    assert find_model(run.path, None).source.name == "ppo" and report_of(recipe, run) == {}
    record = json.loads((run.sft / "stage.json").read_text())
    (run.sft / "stage.json").write_text(json.dumps(record | {"made": "again"}))
    with pytest.raises(ValueError, match="the sft stage was made again after ppo"):
        find_model(run.path, None)
    assert find_model(run.path, "sft").source.name == "sft" and report_of(recipe, run) is None


def test_a_policy_is_not_offered_over_another_sft_model_of_another_run():
    complete(recipe_with("name=first"), "sft")
    recipe, sft = recipe_with("ppo.sft_model_path=runs/first/sft"), Path("runs/first/sft")
    run = RunDirectory.of(recipe)
    complete(recipe, "ppo", "eval")
    (run.eval / "report.json").write_text("{}")
    assert find_model(run.path, None).source.name == "ppo" and report_of(recipe, run) == {}
    record = json.loads((sft / "stage.json").read_text())
    (sft / "stage.json").write_text(json.dumps(record | {"made": "again"}))
    with pytest.raises(ValueError, match="the sft stage in 'runs/first/sft' was made again after ppo"):
        find_model(run.path, None)
    assert find_model(run.path, "sft").source.name == "sft" and report_of(recipe, run) is None
    (sft / "stage.json").unlink()  # as while it is trained
    with pytest.raises(ValueError, match="was made again after ppo"):
        find_model(run.path, None)
    (sft / "started.json").unlink()  # a model that no stage has made
    assert find_model(run.path, None).source.name == "ppo"


def test_cards_are_written_for_the_models_that_the_recipe_makes(monkeypatch):
    recipe = recipe_with("ppo=null", "eval.systems=[base, sft]")
    run, written = RunDirectory.of(recipe), []
    for stage in ("sft", "ppo"):
        run.stage(stage).mkdir(parents=True)
        (run.stage(stage) / "config.json").write_text("{}")
    run.eval.mkdir()
    (run.eval / "report.json").write_text("{}")
    monkeypatch.setattr(model_cards, "card_facts", lambda recipe, run, stage: written.append(stage))
    monkeypatch.setattr(model_cards, "model_card", lambda facts, report: "")
    write_model_cards(recipe, run, "eval")
    assert written == ["sft"]


def test_a_revision_is_that_of_the_recipes_own_model():
    config = ModelConfig("org/a", model_revision="v1")
    assert (config.revision_of("org/a"), config.revision_of("org/b")) == ("v1", "main")
    recipe = recipe_with("model={model_name_or_path: org/a, model_revision: v1}", "ppo.sft_model_path=org/b")
    assert external_models(recipe, "ppo") == {"org/a": "v1", "org/b": "main"}


def test_a_model_that_is_cached_at_its_revision_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(hub, "cached_commit", lambda path, revision="main": "abc" if revision == "v1" else None)
    monkeypatch.setattr(hub, "ask_hub", lambda *given: pytest.fail("asked"))
    hub.check_model_path("org/a", "model.model_name_or_path", "v1")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuse(*given):
        raise OSError(number, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"the file system of .* has no file locks .*output_dir"), run_lock(tmp_path):
        pass


def test_a_task_without_chats_gives_its_text_as_it_is():
    recipe = recipe_with()

    class Config:
        language = ppo_examples = None

    task = replace(recipe.task, config=Config())
    assert prompt_from(replace(recipe, task=task), "say", has_template=True) == "say"
