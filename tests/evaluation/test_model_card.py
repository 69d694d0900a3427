"""Model cards: what the Hub reads of them, their figures and words, and that no text breaks out of its line."""

from dataclasses import asdict, replace

import pytest
from evaluation_toys import BAD, BLEU, GOOD, MIXED, TER, make_report
from huggingface_hub import ModelCard

from pipeline.evaluation.pages.model_card import CardFacts, model_card

FACTS = CardFacts(
    name="demo",
    stage="ppo",
    seed=3,
    base="org/model-0.5B",
    start="the SFT model of the same run",
    hub_base="org/model-0.5B",
    data="parallel: data_dir data/pairs, source {split}.en",
    data_name="pairs",
    language="de",
    rewards=["bleu x 1"],
    is_adapter=True,
    auto_class="AutoModelForCausalLM",
    path="runs/demo/ppo",
    recipe="# The recipe\nname: demo\n",
    versions={"python": "3.11", "torch": "2.13"},
)


@pytest.fixture(scope="module")
def report() -> dict:
    texts = {"base": BAD, "sft": MIXED, "ppo": GOOD}
    settings = {"test_examples": 12, "decoding": "greedy", "confidence": 0.95}
    return asdict(make_report(texts, metrics=(BLEU, TER), **settings)[0])


def test_the_metadata_is_what_the_hub_reads(report):
    data = ModelCard(model_card(FACTS, report)).data
    assert (data.model_name, data.library_name, data.pipeline_tag) == ("demo-ppo", "peft", "text-generation")
    assert (data.base_model, data.base_model_relation, data.language) == ("org/model-0.5B", "adapter", "de")
    results = {result.metric_type: result for result in data.eval_results}
    assert {"bleu", "ter"} == set(results) and results["bleu"].dataset_name == "pairs"
    for name, result in results.items():
        assert result.metric_value == pytest.approx(report["systems"]["ppo"]["metrics"][name]["value"], abs=1e-4)
    assert "model-index" in data.to_dict()


def test_the_text_has_verdict_figures_loading_limits_and_recipe(report):
    text = ModelCard(model_card(FACTS, report)).text
    assert report["verdict"] in text and "12 examples" in text and "greedy" in text
    for c in report["comparisons"]:
        row = f"| {c['b']} - {c['a']} | {c['metric']} | {c['delta']:+.3f} | {c['low']:+.3f} to {c['high']:+.3f} |"
        assert (row in text) == ("ppo" in (c["a"], c["b"]))
    assert all(f"- {warning}" in text for warning in report["warnings"])
    assert "| seed | 3 |" in text and "bleu x 1" in text and "name: demo" in text and "torch 2.13" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("runs/demo/ppo")' in text
    assert 'AutoTokenizer.from_pretrained("runs/demo/ppo")' in text


def test_before_the_evaluation_there_are_no_figures():
    card = ModelCard(model_card(FACTS, None))
    assert card.data.eval_results is None and "Not evaluated yet." in card.text and "p Holm" not in card.text


def test_an_sft_model_from_scratch_is_a_whole_model_without_a_base_on_the_hub(report):
    facts = replace(FACTS, stage="sft", base="random weights (t5)", hub_base=None, is_adapter=False, rewards=[])
    card = ModelCard(model_card(replace(facts, auto_class="AutoModelForSeq2SeqLM"), report))
    assert card.data.base_model is None and card.data.library_name == "transformers"
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card.text and "peft" not in card.text
    assert report["verdict"] not in card.text and "rewards" not in card.text
    assert card.data.eval_results[0].metric_value == round(report["systems"]["sft"]["metrics"]["bleu"]["value"], 4)


def test_a_model_that_hears_is_loaded_by_classes_that_know_it():
    facts = replace(FACTS, auto_class="AutoModelForSpeechSeq2Seq")
    card = ModelCard(model_card(facts, None))
    assert "AutoPeft" not in card.text and "PeftModel.from_pretrained(base, " in card.text
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    assert "AutoModelForSpeechSeq2Seq.from_pretrained(" in model_card(replace(facts, is_adapter=False), None)


def test_texts_stay_on_their_line(report):
    hostile = "a | b\n# A heading <script>"
    facts = replace(FACTS, base=hostile, data=hostile, rewards=[hostile], hub_base=None)
    text = model_card(facts, {**report, "verdict": hostile, "warnings": [hostile]})
    assert "\n# A heading" not in text and "<script>" not in text and "a \\| b" in text
    ModelCard(text)
