"""An evaluation that is made again, or goes on, writes only the texts that are not there."""

import json
import shutil
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from pipeline import eval as eval_stage
from pipeline.evaluation import systems
from pipeline.evaluation.decodings import DecodedText
from pipeline.evaluation.divergence import SampleMeasure
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.system_predictions import KeptPredictions, SystemPredictions
from pipeline.models.hub import CONFIG_FILES
from pipeline.recipe import load_recipe
from pipeline.stages.directory import RunDirectory
from tests.faults.tiny_run import tiny_recipe

EVAL = {"metrics": ["token_f1"], "samples_per_prompt": 2, "sample_prompts": 2, "max_new_tokens": 4, "beam_sizes": [2]}
WHOLE = SystemPredictions(
    [Prediction(0, "Grüße \n\u2028", [5, 6], True, 0.1 + 0.2, 3)],
    {2: [DecodedText(0, "", [])]},
    [DecodedText(0, "b", [7]), DecodedText(0, "c", [8])],
    [SampleMeasure(2, 1.5, None), SampleMeasure(1, 0.0, -1e-17)],
    same_weights_as_sft=True,
)


def test_what_is_kept_is_read_back_whole(tmp_path):
    kept = KeptPredictions(tmp_path, {"sft": "key"})
    kept.keep("sft", WHOLE)
    kept.keep("no key", WHOLE)
    assert kept.find(["sft", "no key", "ppo"]) == {"sft": replace(WHOLE, is_kept=True)}
    (tmp_path / "eval").rename(tmp_path / "eval.outdated-1")
    assert list(kept.find(["sft"])) == ["sft"] and not KeptPredictions(tmp_path, {"sft": "other"}).find(["sft"])
    shutil.rmtree(tmp_path / "eval.outdated-1")
    assert list(kept.find(["sft"])) == ["sft"]  # it was kept again
    (file,) = tmp_path.glob("*/texts/*")
    file.write_text(file.read_text()[:-9])
    assert not kept.find(["sft"])


@pytest.fixture
def evaluate(tmp_path, taught_directory, fresh_accelerate, monkeypatch):
    """Evaluate two finished models, with overrides; returns the report and the systems that wrote texts."""
    path, written = tiny_recipe(tmp_path, model={"model_name_or_path": str(taught_directory)}), []
    for name in "ab":
        AutoModelForCausalLM.from_pretrained(taught_directory).save_pretrained(tmp_path / name)
        for file in taught_directory.iterdir():
            if file.name not in CONFIG_FILES and not (tmp_path / name / file.name).exists():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    recipe = json.loads(path.read_text())
    recipe["model"].pop("from_scratch")
    named = [{"name": name, "path": str(tmp_path / name)} for name in "ab"]
    recipe = {key: recipe[key] for key in ("name", "output_dir", "model", "task")}
    path.write_text(json.dumps(recipe | {"eval": EVAL | {"systems": named}}))
    predict = systems.predict_system

    def noted(name, *arguments):
        written.append(name)
        return predict(name, *arguments)

    monkeypatch.setattr(systems, "predict_system", noted)

    def run(*overrides):
        written.clear()
        assert eval_stage.main([str(path), *overrides]) == 0
        directory = RunDirectory.of(load_recipe(path)).eval
        return json.loads((directory / "report.json").read_text()), "".join(written)

    return run


def test_another_metric_is_computed_of_the_same_texts(evaluate, capsys):
    first, written = evaluate()
    assert written == "ab" and first["cost"][-1]["tokens"] > 0
    again, written = evaluate("eval.metrics=[token_f1, chrf]", "eval.n_bootstrap=1001")
    assert written == "" and again["cost"][-1]["tokens"] == 0
    assert "a: 6 completions are there, written before with the same settings" in capsys.readouterr().err
    for name, system in first["systems"].items():
        more = again["systems"][name]
        assert more["metrics"]["token_f1"]["value"] == system["metrics"]["token_f1"]["value"]
        assert "chrf" in more["metrics"] and "chrf" not in system["metrics"]
        unchanged = system.keys() - {"metrics", "predictions"}
        assert {key: more[key] for key in unchanged} == {key: system[key] for key in unchanged}
    assert again["best_of"] == first["best_of"] and len(again["decodings"]) == len(first["decodings"])


def test_what_decides_the_texts_makes_them_anew(evaluate, tmp_path, taught_directory):
    evaluate()
    third = f"{{name: c, path: {taught_directory}}}"
    named = ", ".join(f"{{name: {name}, path: {tmp_path / name}}}" for name in "ab")
    for override, expected in {
        "seed=9": "ab",
        "eval.max_new_tokens=3": "ab",
        "eval.beam_sizes=[]": "ab",
        "eval.samples_per_prompt=3": "ab",
        "model.dtype=bfloat16": "ab",
        "task.max_test_examples=3": "ab",
        f"eval.systems=[{named}, {third}]": "c",
        "eval.confidence=0.9": "",
    }.items():
        assert evaluate(override)[1] == expected, override
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    model.get_output_embeddings().weight.data.mul_(2)
    model.save_pretrained(tmp_path / "b")
    assert evaluate()[1] == "b"


def test_an_evaluation_that_was_interrupted_keeps_the_systems_before(evaluate, monkeypatch):
    noted = systems.predict_system

    def interrupted(name, *arguments):
        if name == "b":
            raise ValueError("the power failed")
        return noted(name, *arguments)

    monkeypatch.setattr(systems, "predict_system", interrupted)
    with pytest.raises(AssertionError):
        evaluate()
    monkeypatch.setattr(systems, "predict_system", noted)
    assert evaluate()[1] == "b"
