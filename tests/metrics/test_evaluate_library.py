"""Metrics of the `evaluate` library: local scripts, and no network."""

import evaluate
import numpy as np
import pytest

from pipeline.metrics import Metric, load_metric
from pipeline.runtime import hub

SCRIPT = """
import datasets
import evaluate

TEXT = datasets.Value("string", id="sequence")


class Module(evaluate.Metric):
    def _info(self):
        features = datasets.Features({features})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, **options):
        pairs = list(zip(predictions, references))
        {body}
"""
FLAT = '{"predictions": TEXT, "references": TEXT}'
NESTED = '{"predictions": TEXT, "references": datasets.Sequence(TEXT)}'
SHARE = 'return {"share": 5 * sum(p == r for p, r in pairs) / len(pairs)}'


@pytest.fixture
def script(tmp_path):
    """Writes a metric script and gives its name for `load_metric`."""

    def write(name, features, body):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(SCRIPT.replace("{features}", features).replace("{body}", body))
        return f"evaluate:{tmp_path / name}"

    return write


def test_flat_references_on_the_modules_own_scale(script):
    metric = load_metric(script("share_flat", FLAT, SHARE), "de")
    assert isinstance(metric, Metric)
    assert metric.sample_scores(["a", "b"], [["a"], ["c"]]) == [5.0, 0.0]
    score = metric.corpus_score(["a", "b"], [["a"], ["c"]], n_bootstrap=50)
    assert (score.value, score.low, score.high) == (2.5, 0.0, 5.0)
    assert evaluate.__version__ in score.signature


@pytest.mark.parametrize(("name", "higher"), [("wer", False), ("mse", False), ("share", True)])
def test_error_rates_that_are_known_by_name_are_better_where_they_are_lower(script, name, higher):
    path = script(name, FLAT, SHARE)
    assert load_metric(path).higher_is_better == higher
    assert load_metric(path, higher_is_better=not higher).higher_is_better != higher


def test_flat_module_refuses_a_second_reference(script):
    metric = load_metric(script("share_one", FLAT, SHARE))
    with pytest.raises(ValueError, match="takes one reference"):
        metric.sample_scores(["a", "b"], [["a"], ["b", "c"]])


def test_nested_references_of_varying_number(script):
    body = 'return {"hits": sum(p in r for p, r in pairs) / len(pairs)}'
    metric = load_metric(script("hits_nested", NESTED, body))
    assert metric.sample_scores(["a", "b", ""], [["x", "a"], ["c"], [""]]) == [1.0, 0.0, 1.0]


def test_metric_that_is_a_mean_is_not_recomputed(script, monkeypatch):
    metric = load_metric(script("share_mean", FLAT, SHARE))
    predictions, references = list("abcd"), [["a"], ["x"], ["c"], ["x"]]
    calls = []
    compute = metric.module.compute
    monkeypatch.setattr(metric.module, "compute", lambda **inputs: calls.append(1) or compute(**inputs))
    rows = np.array([[0, 0, 0, 1], [1, 3, 3, 1], [0, 2, 0, 2]])
    assert metric.resampled_scores(predictions, references, rows).tolist() == [3.75, 0.0, 5.0]
    assert len(calls) == 5  # the whole and four examples


def test_metric_that_is_no_mean_is_recomputed(script):
    """The ratio of lengths: 1/4, 3/1 and 2/2 by themselves, 6/7 together, 5/9 for examples 0, 0 and 1."""
    body = 'return {"ratio": sum(len(p) for p, r in pairs) / sum(len(r) for p, r in pairs)}'
    metric = load_metric(script("ratio", FLAT, body))
    examples = ["a", "bbb", "cc"], [["aaaa"], ["b"], ["cc"]]
    assert metric.corpus_score(*examples, n_bootstrap=0).value == pytest.approx(6 / 7)
    assert metric.resampled_scores(*examples, np.array([[0, 0, 1]])) == pytest.approx([5 / 9])


def test_metric_that_fails_on_single_examples_still_has_a_corpus_score(script):
    body = "1 / (len(pairs) - 1); " + SHARE
    metric = load_metric(script("plural", FLAT, body))
    assert metric.corpus_score(["a", "b"], [["a"], ["c"]], n_bootstrap=5).value == 2.5
    with pytest.raises(ValueError, match="failed with ZeroDivisionError"):
        metric.sample_scores(["a", "b"], [["a"], ["c"]])


def test_key_chooses_among_several_numbers(script):
    body = 'return {"precision": 0.25, "recall": 0.75, "words": ["x"]}'
    name = script("several", FLAT, body)
    assert load_metric(name, key="recall").sample_scores(["a"], [["a"]]) == [0.75]
    for options in ({}, {"key": "f1"}):
        with pytest.raises(ValueError, match="the option `key` one of precision, recall, words"):
            load_metric(name, **options).sample_scores(["a"], [["a"]])


def test_key_of_a_list_with_a_number_for_each_example(script):
    body = 'return {"f1": [0.5 if p == r else 0.1 for p, r in pairs], "hashcode": "x"}'
    metric = load_metric(script("listing", FLAT, body), key="f1")
    assert metric.sample_scores(["a", "b"], [["a"], ["c"]]) == [0.5, 0.1]
    assert metric.corpus_score(["a", "b"], [["a"], ["c"]], n_bootstrap=0).value == pytest.approx(0.3)


@pytest.mark.parametrize("key", ["precisions", "words"])
def test_a_list_without_a_number_for_each_example_is_refused(script, key):
    body = 'return {"precisions": [0.1, 0.2, 0.3], "words": ["x"] * len(pairs), "score": 0.5}'
    metric = load_metric(script("lists", FLAT, body), key=key)
    with pytest.raises(ValueError, match=f"'{key}' is a list, but not of one number for each .* of precisions, words"):
        metric.sample_scores(["a", "b"], [["a"], ["c"]])


def test_lower_is_better_turns_the_sign_of_samples_only(script):
    metric = load_metric(script("errors", FLAT, SHARE), higher_is_better=False)
    assert metric.sample_scores(["a"], [["a"]]) == [-5.0]
    assert metric.corpus_score(["a"], [["a"]], n_bootstrap=0).value == 5.0
    assert not metric.higher_is_better


def test_other_options_go_to_compute(script):
    metric = load_metric(script("weighted", FLAT, 'return {"x": options["weight"]}'), weight=0.125)
    assert metric.sample_scores(["a"], [["a"]]) == [0.125]
    assert "weight:0.125" in metric.signature


def test_module_with_other_inputs_is_refused(script):
    name = script("sourced", FLAT.replace("}", ', "sources": TEXT}'), SHARE)
    with pytest.raises(ValueError, match="needs predictions, references, sources"):
        load_metric(name)


def test_script_that_needs_a_missing_package(script):
    name = script("needy", FLAT, "return {}\n\n\nimport no_such_package_at_all")
    with pytest.raises(ValueError, match="no_such_package_at_all"):
        load_metric(name)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_is_not_asked_or_does_not_answer_is_named(monkeypatch, offline):
    def repo_info(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("the library would wait for minutes"))
    with pytest.raises(ValueError, match=r"'evaluate:no_such_metric' cannot be loaded.*evaluate:path/to/metric"):
        load_metric("evaluate:no_such_metric", trust_remote_code=True)


def test_a_cached_script_is_used_offline(script, monkeypatch):
    name = script("share_cached", FLAT, SHARE)
    load = evaluate.load
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate, "load", lambda path, *rest, **keys: load(name.removeprefix("evaluate:"), **keys))
    metric = load_metric("evaluate:in_the_cache", trust_remote_code=True)
    assert metric.sample_scores(["a"], [["a"]]) == [5.0]


def test_a_script_of_the_hub_runs_only_where_the_recipe_trusts_it(monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("loaded a script that nobody trusts"))
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match=r"'evaluate:bleu' is a script .*bleu, trust_remote_code: true"):
            load_metric("evaluate:bleu", **options)


def test_missing_local_path():
    with pytest.raises(ValueError, match=r"evaluate:./no/such/metric.py' cannot be loaded"):
        load_metric("evaluate:./no/such/metric.py")
