"""Which models of a run get a card, when, and what it says of where they come from."""

import json
from dataclasses import asdict

import pytest
from demo_run import recipe_with
from huggingface_hub import ModelCard
from transformers import AutoConfig

from pipeline.stages.directory import RunDirectory
from pipeline.stages.model_cards import card_facts, write_model_cards
from tests.evaluation.evaluation_toys import GOOD, MIXED, make_report

BASE = "model={model_name_or_path: org/base-1B}"


@pytest.fixture
def run():
    """A run with an SFT model and an adapter, both without weights."""
    recipe = recipe_with("task.language=de")
    run = RunDirectory.of(recipe)
    run.save_recipe(recipe)
    for stage in ("sft", "ppo", "control", "eval", "reward"):
        run.stage(stage).mkdir(parents=True)
    AutoConfig.for_model("llama").save_pretrained(run.sft)
    for stage in ("ppo", "control", "reward"):
        (run.stage(stage) / "adapter_config.json").write_text("{}")
    return run


def card(run: RunDirectory, stage: str) -> ModelCard:
    return ModelCard.load(run.stage(stage) / "README.md")


def test_a_stage_writes_its_own_card_and_the_evaluation_all(run):
    recipe = recipe_with("task.language=de")
    write_model_cards(recipe, run, "sft")
    assert "Not evaluated yet." in card(run, "sft").text and not (run.ppo / "README.md").exists()
    write_model_cards(recipe, run, "reward")
    write_model_cards(recipe, run, "eval")  # without a report: a stage that was told to do nothing
    assert not (run.reward / "README.md").exists() and not (run.ppo / "README.md").exists()
    settings = {"test_examples": 12, "decoding": "greedy", "confidence": 0.95}
    report = asdict(make_report({"sft": MIXED, "ppo": GOOD}, **settings)[0])
    (run.eval / "report.json").write_text(json.dumps(report))
    write_model_cards(recipe, run, "eval")
    values = [card(run, stage).data.eval_results[0].metric_value for stage in ("sft", "ppo")]
    assert values == [round(report["systems"][name]["metrics"]["bleu"]["value"], 4) for name in ("sft", "ppo")]
    assert report["verdict"] in card(run, "ppo").text and not (run.reward / "README.md").exists()
    assert "name: demo" in card(run, "ppo").text and card(run, "ppo").data.language == "de"


def test_the_control_has_a_card_that_says_what_it_is(run):
    write_model_cards(recipe_with(), run, "control")
    assert not (run.ppo / "README.md").exists()
    control = card(run, "control")
    assert "shuffled scores" in control.text and "bleu x 1" in control.text and control.data.library_name == "peft"
    report = asdict(make_report({"sft": MIXED, "ppo": GOOD}, test_examples=12, decoding="greedy", confidence=0.95)[0])
    report["systems"]["control"] = report["systems"]["sft"]
    (run.eval / "report.json").write_text(json.dumps(report))
    write_model_cards(recipe_with("control=true"), run, "eval")
    control = card(run, "control")
    assert report["verdict"] not in control.text and control.data.eval_results[0].metric_value > 0


@pytest.mark.parametrize(
    ("override", "base", "on_hub", "data"),
    [
        ("seed=0", "random weights (llama)", None, "demo"),
        (BASE, "org/base-1B", "org/base-1B", "demo"),
        ("model={model_name_or_path: .}", ".", None, "demo"),
        ("task={name: parallel, source: 'a/{split}.en', target: 'b/{split}', data_dir: x/p}", "random", None, "p"),
        ("task={name: columns, path: 'x/y/{split}.jsonl', prompt: q, references: a}", "random", None, "y"),
        ("task={name: columns, path: '{split}.jsonl', prompt: q, references: a}", "random", None, "demo"),
    ],
)
def test_base_and_data_are_named(run, override, base, on_hub, data):
    facts = card_facts(recipe_with(override), run, "sft")
    assert facts.base.startswith(base) and (facts.hub_base, facts.data_name) == (on_hub, data)
    assert facts.rewards == [] and not facts.is_adapter


def test_the_base_of_a_policy_over_another_model_is_that_model(run):
    facts = card_facts(recipe_with(f"ppo.sft_model_path={run.sft}"), run, "ppo")
    assert (facts.base, facts.start, facts.hub_base, facts.is_adapter) == (str(run.sft), str(run.sft), None, True)
    assert facts.rewards == ["bleu x 1"]
    assert card_facts(recipe_with(), run, "ppo").start == "the SFT model of the same run"


def test_a_weight_that_changes_is_named_by_its_last_value(run):
    recipe = recipe_with("ppo.rewards=[{name: bleu, weight: [[0, 0.0], [500, 0.5]]}]")
    write_model_cards(recipe, run, "ppo")
    assert "bleu x 0.5" in card(run, "ppo").text
