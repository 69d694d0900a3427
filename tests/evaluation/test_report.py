"""The figures of a system and of a comparison, and that report.json keeps its contract."""

import json
import math
from pathlib import Path

import pytest
from evaluation_toys import BAD, BLEU, GOOD, MIXED, REFERENCES, TER, TEST, make_report, prediction

from pipeline.evaluation.assemble import Details, all_examples, training_stages
from pipeline.evaluation.closed_forms import holm
from pipeline.evaluation.divergence import SampleMeasure
from pipeline.evaluation.gains import paired_shares
from pipeline.evaluation.pages.render import write_report
from pipeline.evaluation.report import Outputs, Resampling, TestSet, compared_pairs, score_system
from pipeline.evaluation.significance import (
    RANDOMISATION,
    Comparison,
    paired_bootstrap,
    paired_randomisation,
)
from pipeline.evaluation.systems import Source
from pipeline.models.config import ModelConfig


def test_figures_of_a_system():
    items = [
        prediction("one two", completion_ids=[1, 2, 3], finished=False),
        prediction("", completion_ids=[2], reference_nats=1.0, reference_tokens=1),
    ]
    test, resampling = TestSet(["p", "q"], [["one two"], ["x"]]), Resampling(20, 0.9, 0)
    samples = [SampleMeasure(3, 5.0, 1.0), SampleMeasure(1, 1.0, 0.0)]
    outputs = Outputs(items, [1.0, 0.5], {"a": [1.0, math.nan], "b": [math.nan] * 2}, measures=samples)
    system = score_system(outputs, test, [BLEU], resampling, "f")
    assert (system.mean_reward, system.cumulative_reward) == (0.75, 1.5)
    assert system.rewards == {"a": 1.0, "b": None}  # over the completions a reward applies to
    assert (system.cross_entropy, system.perplexity) == (1.0, math.e)
    assert (system.length, system.finished, system.samples, system.sampled_length) == (2.0, 0.5, 2, 2.0)
    assert (system.kl_to_sft, system.kl_per_token) == (0.5, 0.25)
    assert system.kl_to_sft_error == pytest.approx(0.5)  # the deviation is sqrt(1 / 2), of two samples
    assert system.entropy == 1.5  # by token: (5 + 1) / (3 + 1)
    assert system.entropy_error == pytest.approx(0.25)  # residuals 5 - 4.5 and 1 - 1.5: sqrt(2 * 0.5) / 4
    assert system.metrics["bleu"] == BLEU.corpus_score(["one two", ""], [["one two"], ["x"]], 20, 0.9, 0)
    alone = [SampleMeasure(4, 2.0, None)]
    without = score_system(Outputs(items, measures=alone), test, [BLEU], resampling, "f")
    assert (without.mean_reward, without.cumulative_reward, without.rewards) == (None, None, {})
    assert (without.kl_to_sft, without.kl_to_sft_error, without.entropy_error) == (None, None, None)
    assert (without.entropy, without.kl_per_token) == (0.5, 0.0)


def test_report_json_keeps_its_contract(tmp_path):
    report, outputs = make_report({"base": BAD, "sft": MIXED, "ppo": GOOD}, metrics=(BLEU, TER), seed=3)
    write_report(report, Details(all_examples(TEST, outputs, "bleu")), tmp_path / "new" / "eval")
    text = (tmp_path / "new" / "eval" / "report.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert {"systems", "comparisons", "settings"} <= found.keys()
    assert list(found["systems"]) == ["base", "sft", "ppo"]
    figures = "metrics mean_reward cumulative_reward cross_entropy perplexity kl_to_sft length predictions"
    figures += " entropy kl_to_sft_error entropy_error samples sampled_length"
    for name, system in found["systems"].items():
        assert set(figures.split()) <= system.keys()
        assert system["predictions"] == f"predictions/{name}.jsonl"
        assert list(system["metrics"]) == ["bleu", "ter"]
        for score in system["metrics"].values():
            assert score.keys() == {"value", "low", "high", "signature"}
            assert score["low"] <= score["value"] <= score["high"] and score["signature"]
    assert found["systems"]["ppo"]["metrics"]["bleu"]["value"] == pytest.approx(100)
    pairs = [(c["a"], c["b"], c["metric"]) for c in found["comparisons"]]
    assert pairs == [(a, b, m) for a, b in (("base", "sft"), ("sft", "ppo")) for m in ("bleu", "ter", "reward")]
    assert all({"a", "b", "metric", "delta", "p_value"} <= c.keys() for c in found["comparisons"])
    for c in found["comparisons"][:2]:
        values = [found["systems"][name]["metrics"][c["metric"]]["value"] for name in (c["a"], c["b"])]
        assert c["delta"] == pytest.approx(values[1] - values[0])
    assert found["settings"] == {"seed": 3}


def test_a_comparison_has_both_tests_the_shares_and_holms_correction():
    report, _ = make_report({"sft": MIXED, "ppo": GOOD}, metrics=(BLEU, TER))
    bleu, ter, reward = report.comparisons
    bootstrap = paired_bootstrap(BLEU, MIXED, GOOD, REFERENCES, 1000, 0)
    found = Comparison(bleu.delta, bleu.low, bleu.high, bleu.p_bootstrap, bleu.standard_error)
    assert found == bootstrap
    assert bleu.p_randomisation == paired_randomisation(BLEU, MIXED, GOOD, REFERENCES, 1000, 0)
    assert (bleu.test, bleu.p_value) == (RANDOMISATION, bleu.p_randomisation)  # twelve examples
    shares = paired_shares(BLEU.sample_scores(MIXED, REFERENCES), BLEU.sample_scores(GOOD, REFERENCES))
    assert (bleu.wins, bleu.losses, bleu.p_better) == (shares.wins, shares.losses, shares.better) == (0.5, 0, 0.75)
    assert (bleu.gain > 0, ter.gain > 0, ter.delta < 0) == (True, True, True)
    assert ter.wins == 0.5  # B is better, whichever way the metric points
    assert bleu.smallest_difference == pytest.approx((2.20099 + 0.87553) * bleu.standard_error, rel=1e-5)  # t, 11 df
    assert bleu.equivalence_margin == pytest.approx(bleu.delta + 1.79588 * bleu.standard_error, rel=1e-5)
    assert [c.p_holm for c in (bleu, ter, reward)] == holm([c.p_value for c in (bleu, ter, reward)])
    assert reward.p_holm == 1.0


def test_holm_counts_all_comparisons_of_the_run():
    """Three pairs by two measures are six comparisons, not three times two."""
    report, _ = make_report({"base": BAD, "sft": MIXED, "other": GOOD, "ppo": GOOD})
    assert len(report.comparisons) == 6
    assert [c.p_holm for c in report.comparisons] == holm([c.p_value for c in report.comparisons])
    bleu = next(c for c in report.comparisons if (c.b, c.metric) == ("ppo", "bleu"))
    assert bleu.p_holm > 3 * bleu.p_value


def test_what_is_compared_with_what():
    assert compared_pairs(["base", "sft", "ppo"]) == [("base", "sft"), ("sft", "ppo")]
    found = compared_pairs(["sft", "other", "ppo", "control"])
    assert found == [("sft", "ppo"), ("sft", "other"), ("sft", "control"), ("control", "ppo")]
    assert compared_pairs(["base", "ppo"]) == [("base", "ppo")]  # without SFT, the first system with each other


def test_best_of_n_counts_every_sample():
    """Of two samples a prompt, the good one is drawn first half of the time: best of 1 is the mean, of 2 the good."""
    samples = [text for good, bad in zip(GOOD, BAD, strict=True) for text in (bad, good)]
    report, _ = make_report({"sft": MIXED, "ppo": GOOD}, samples={"sft": samples})
    one, two = report.best_of["sft"].curves["bleu"]
    assert (one, two) == pytest.approx((0.5, 1.0), abs=0.06)  # three words have no 4-gram: smoothing, not quite 1
    assert two - one > 0.4
    assert report.best_of["sft"].decoded["bleu"] == pytest.approx(0.5, abs=0.06)
    assert list(report.best_of) == ["sft"]


@pytest.mark.parametrize(
    ("sft", "rewards", "stages"),
    [
        ("run/sft", ["bleu x 1"], ["sft", "ppo", "control"]),
        ("run/sft", ["learned x 1", "bleu x 1"], ["sft", "reward", "ppo", "control"]),
        ("other/sft", ["bleu x 1"], ["ppo", "control"]),
    ],
)
def test_costs_are_those_of_the_stages_that_the_systems_come_from(sft, rewards, stages):
    """Of an earlier recipe in the same folder there may be others."""
    run, sft = Path("run"), Path(sft)
    systems = [("sft", sft, None), ("ppo", run / "ppo", sft), ("control", run / "control", sft)]
    sources = [Source(name, path, ModelConfig("x"), base) for name, path, base in systems]
    assert training_stages(sources, run, rewards) == stages
