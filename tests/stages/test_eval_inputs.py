"""How the systems of a report answer: the temperature of samples and the precision, as in PPO."""

import weakref
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from demo_run import recipe_with, write_demo

from pipeline.evaluation import systems
from pipeline.evaluation.system_predictions import SystemPredictions
from pipeline.evaluation.systems import Answering, Source, predict_systems
from pipeline.stages import eval_inputs
from pipeline.stages.eval_inputs import checkpoint_rules, report_answering, report_settings
from pipeline.tasks import Task


@pytest.fixture
def task(tmp_path, monkeypatch) -> Task:
    """The demo's recipe in the current directory, and any task."""
    monkeypatch.chdir(tmp_path)
    write_demo()
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "references": [["b"]]})
    return Task(train=rows, validation=rows, test=rows)


def test_samples_have_the_temperature_of_ppos_end(task):
    recipe = recipe_with("ppo.temperature=0.4")
    assert report_answering(recipe, task).temperature == report_settings(recipe, task)["kl_temperature"] == 0.4
    falling = recipe_with("ppo.temperature=[[0, 1.0], [20, 0.5]]")
    assert report_answering(falling, task).temperature == 0.5
    assert report_answering(replace(recipe, ppo=None), task).temperature == 1.0


@pytest.mark.parametrize(
    ("native", "bf16", "expected"),
    [(True, "null", True), (True, "true", True), (True, "false", False), (False, "null", False)],
)
def test_passes_have_the_precision_of_ppos(native, bf16, expected, task, monkeypatch):
    monkeypatch.setattr(eval_inputs, "native_bf16", lambda: native)
    recipe = recipe_with(f"ppo.bf16={bf16}")
    assert report_answering(recipe, task).bf16 == expected
    assert report_settings(recipe, task)["precision"] == ("bfloat16 (autocast)" if expected else "float32")


@pytest.mark.parametrize("bf16", [True, False])
def test_systems_answer_under_autocast(bf16, task, monkeypatch):
    answering, seen = Answering(recipe_with().eval, bf16=bf16), []

    def predict(*arguments) -> SystemPredictions:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return SystemPredictions([])

    class Loaded:
        name = "other"

        def load(self, sharding: object) -> None:
            return None

    monkeypatch.setattr(systems, "predict_system", predict)
    predict_systems([Loaded()], None, task.test, answering)
    assert seen == [(bf16, torch.bfloat16)]


def test_without_an_evaluation_nothing_chose_the_checkpoint_of_sft(task):
    assert checkpoint_rules(recipe_with())["sft"] == "eval_loss"
    assert checkpoint_rules(recipe_with("sft.eval_strategy=no"))["sft"] is None


def test_besides_sft_one_system_at_a_time_is_in_memory(task, monkeypatch):
    alive: dict[str, weakref.ref] = {}

    def load(source: Source, sharding: object = None) -> tuple[torch.nn.Module, None]:
        assert [name for name, model in alive.items() if model() is not None and name != "sft"] == []
        alive[source.name] = weakref.ref(model := torch.nn.Linear(1, 1))
        return model, None

    monkeypatch.setattr(Source, "load", load)
    monkeypatch.setattr(systems, "predict_system", lambda *arguments: SystemPredictions([]))
    sft, *others = (Source(name, name, recipe_with().model) for name in ("sft", "ppo", "control"))
    assert len(predict_systems([sft, *others], sft, task.test, Answering(recipe_with().eval))) == 3
    assert alive["sft"]() is None and alive["control"]() is None
