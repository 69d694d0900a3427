"""The figures of the report against direct computation, and what its files say."""

import json
import math
from dataclasses import asdict, replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from pipeline.evaluation.predictions import Prediction, cross_entropy, predict, save_predictions
from pipeline.evaluation.report import (
    EvaluationReport,
    SystemComparison,
    compare_systems,
    find_warnings,
    print_report,
    score_system,
    to_markdown,
    verdict,
    write_report,
)
from pipeline.metrics import load_metric
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_model
from pipeline.models.text import encode_completions, encode_prompts

BLEU = load_metric("bleu")
TER = load_metric("ter")


@pytest.fixture
def sft(taught):
    return taught().eval()


@pytest.fixture
def changed(taught):
    """The SFT model after a push, as a policy would be."""
    model = taught().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def answer(examples, tokenizer):
    """Predictions of a model for six of the examples, compared with the SFT model if one is given."""
    rows = examples.select(range(10))
    rows = rows.remove_columns("references").add_column("references", [[*r, "another"] for r in rows["references"]])
    indices = [7, 0, 3, 9, 1, 4]
    return lambda model, sft=None, size=4: predict(model, tokenizer, rows, indices, Decoding(6), size, sft)


@torch.no_grad()
def log_softmax(model, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def test_cross_entropy_is_that_of_the_first_reference(answer, changed, examples, tokenizer):
    found = answer(changed)
    assert [p.index for p in found] == [7, 0, 3, 9, 1, 4]
    total = tokens = 0
    for prediction in found:
        row = examples[prediction.index]
        prompt = encode_prompts(tokenizer, [row["prompt"]])[0]
        reference = encode_completions(tokenizer, [row["prompt"]], [row["references"][0]])[0]
        logprobs = log_softmax(changed, prompt + reference)
        nats = -sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(reference))
        assert prediction.reference_nats == pytest.approx(nats, rel=1e-5)
        assert prediction.reference_tokens == len(reference)  # EOS included
        total, tokens = total + nats, tokens + len(reference)
    value, perplexity = cross_entropy(found)
    assert value == pytest.approx(total / tokens, rel=1e-5)  # by token, not by example
    assert perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_cross_entropy_by_hand():
    first = prediction(reference_nats=6.0, reference_tokens=2)
    second = prediction(reference_nats=2.0, reference_tokens=6)
    assert cross_entropy([first, second]) == (1.0, math.e)


def test_kl_to_sft_is_the_sum_over_positions_of_the_full_divergence(answer, changed, sft, examples, tokenizer):
    for prediction in answer(changed, sft):
        prompt = encode_prompts(tokenizer, [examples[prediction.index]["prompt"]])[0]
        p = log_softmax(changed, prompt + prediction.completion_ids)[len(prompt) - 1 : -1]
        q = log_softmax(sft, prompt + prediction.completion_ids)[len(prompt) - 1 : -1]
        assert p.shape[0] == len(prediction.completion_ids)
        assert prediction.kl_to_sft == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4, abs=1e-6)
        assert prediction.kl_to_sft > 0.01


def test_kl_to_sft_of_sft_is_0(answer, sft, taught):
    assert [p.kl_to_sft for p in answer(sft, sft)] == [0.0] * 6
    assert [p.kl_to_sft for p in answer(sft, taught().eval())] == [0.0] * 6
    assert [p.kl_to_sft for p in answer(sft)] == [None] * 6


def test_predictions_do_not_depend_on_the_batch_size(answer, changed, sft):
    for one, many in zip(answer(changed, sft, 1), answer(changed, sft, 6), strict=True):
        assert (one.index, one.completion_ids) == (many.index, many.completion_ids)
        assert one.reference_nats == pytest.approx(many.reference_nats, rel=1e-5)
        assert one.kl_to_sft == pytest.approx(many.kl_to_sft, rel=1e-3, abs=1e-5)


def test_finished_means_that_eos_was_written(answer, base_directory, model_config, sft, tokenizer):
    for found in (answer(sft), answer(load_model(base_directory, model_config).eval())):
        for p in found:
            assert p.finished == (p.completion_ids[-1] == tokenizer.eos_token_id)
            assert p.finished or len(p.completion_ids) == 6
            assert "</s>" not in p.completion
    assert any(p.finished for p in answer(sft))


def prediction(completion: str = "a text", **changes) -> Prediction:
    """A prediction with figures that are easy to add up."""
    defaults = Prediction(
        index=0,
        completion=completion,
        completion_ids=[*map(ord, completion), 2],
        finished=True,
        reference_nats=3.0,
        reference_tokens=3,
        kl_to_sft=0.5,
    )
    return replace(defaults, **changes)


REFERENCES = [["the cat sat on the mat"], ["it rains in the north"], ["five red apples"], ["we go home now"]] * 3
GOOD = [texts[0] for texts in REFERENCES]
BAD = ["a dog", "sunshine", "green pears", "they stay"] * 3
MIXED = [good if i % 2 else bad for i, (good, bad) in enumerate(zip(GOOD, BAD, strict=True))]


def make_report(
    texts: dict[str, list[str]], scores: dict[str, list[float]] | None = None, metrics=(BLEU,), **settings
):
    """A report over systems that wrote the given texts."""
    scores = scores if scores is not None else {name: [0.5] * len(found) for name, found in texts.items()}
    predictions = {name: [prediction(text) for text in found] for name, found in texts.items()}
    systems = {
        name: score_system(
            items,
            REFERENCES,
            metrics,
            scores.get(name, []),
            {"mine": scores[name]} if name in scores else {},
            f"predictions/{name}.jsonl",
            50,
            0.95,
            0,
        )
        for name, items in predictions.items()
    }
    comparisons = []
    for a, b in (("base", "sft"), ("sft", "ppo")):
        if a in predictions and b in predictions:
            comparisons += compare_systems(a, b, predictions, REFERENCES, metrics, scores, 200, 0)
    warnings = find_warnings(predictions, comparisons)
    return EvaluationReport(systems, comparisons, verdict(comparisons, metrics[0]), warnings, settings)


def test_figures_of_a_system():
    items = [
        prediction("one two", completion_ids=[1, 2, 3], kl_to_sft=1.0, finished=False),
        prediction("", completion_ids=[2], kl_to_sft=0.0, reference_nats=1.0, reference_tokens=1),
    ]
    system = score_system(
        items, [["one two"], ["x"]], [BLEU], [1.0, 0.5], {"a": [1.0, math.nan], "b": [math.nan] * 2}, "f", 20, 0.9, 0
    )
    assert (system.mean_reward, system.cumulative_reward) == (0.75, 1.5)
    assert system.rewards == {"a": 1.0, "b": None}  # over the completions a reward applies to
    assert (system.cross_entropy, system.perplexity) == (1.0, math.e)
    assert (system.kl_to_sft, system.length, system.finished) == (0.5, 2.0, 0.5)
    assert system.metrics["bleu"] == BLEU.corpus_score(["one two", ""], [["one two"], ["x"]], 20, 0.9, 0)
    without = score_system(items, [["one two"], ["x"]], [BLEU], [], {}, "f", 20, 0.9, 0)
    assert (without.mean_reward, without.cumulative_reward, without.rewards) == (None, None, {})


def test_report_json_keeps_its_contract(tmp_path):
    report = make_report({"base": BAD, "sft": MIXED, "ppo": GOOD}, metrics=(BLEU, TER), seed=3)
    write_report(report, [{"prompt": "p", "ppo": "ö"}], tmp_path / "new" / "eval")
    text = (tmp_path / "new" / "eval" / "report.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert {"systems", "comparisons", "settings"} <= found.keys()
    assert list(found["systems"]) == ["base", "sft", "ppo"]
    for name, system in found["systems"].items():
        assert {
            "metrics",
            "mean_reward",
            "cumulative_reward",
            "cross_entropy",
            "perplexity",
            "kl_to_sft",
            "length",
            "predictions",
        } <= system.keys()
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
    assert "ö" in (tmp_path / "new" / "eval" / "report.md").read_text(encoding="utf-8")


def test_without_rewards_nothing_is_said_of_them():
    report = make_report({"sft": BAD, "ppo": GOOD}, scores={})
    assert [c.metric for c in report.comparisons] == ["bleu"]
    assert "| mean reward | - | - |" in to_markdown(report, [])


@pytest.mark.parametrize(
    ("sft", "ppo", "metric", "sentence"),
    [
        (BAD, GOOD, BLEU, "PPO is better than SFT: bleu +"),
        (GOOD, BAD, BLEU, "PPO is worse than SFT: bleu -"),
        (BAD, GOOD, TER, "PPO is better than SFT: ter -"),  # an error rate: less is better
        (GOOD, BAD, TER, "PPO is worse than SFT: ter +"),
        (MIXED, MIXED, BLEU, "No evidence that PPO changed the quality of SFT: bleu +0.00 "),
        (GOOD[:-1] + BAD[-1:], GOOD, BLEU, "No evidence that PPO changed the quality of SFT: bleu +"),
    ],
)
def test_the_verdict_is_one_sentence(sft, ppo, metric, sentence):
    found = make_report({"sft": sft, "ppo": ppo}, metrics=(metric,)).verdict
    assert found.startswith(sentence) and found.count("\n") == 0
    assert "95 % interval" in found and "p = " in found


def test_the_verdict_takes_the_p_value_at_its_word():
    comparison = SystemComparison("sft", "ppo", "bleu", 1.0, 0.1, 2.0, 0.049)
    assert verdict([comparison], BLEU).startswith("PPO is better")
    assert verdict([replace(comparison, p_value=0.05)], BLEU).startswith("No evidence")
    assert verdict([], BLEU) == verdict([replace(comparison, a="base", b="sft")], BLEU)
    assert "nothing to compare" in verdict([], BLEU)


def test_warnings():
    empty = [""] * 3 + MIXED[3:]
    texts = {"base": [""] * 12, "sft": empty, "ppo": empty}  # an untrained base says little, which is no news
    assert make_report(texts).warnings == [
        "sft and ppo wrote the same text for every prompt: are they the same model?",
        "sft wrote nothing for 3 of 12 prompts",
        "ppo wrote nothing for 3 of 12 prompts",
    ]
    assert make_report({"base": BAD, "sft": MIXED, "ppo": GOOD}).warnings == []


def test_unfinished_completions_are_a_warning():
    half = [prediction(finished=i % 2 == 0) for i in range(10)]
    tenth = [prediction(finished=i > 0) for i in range(10)]
    warnings = find_warnings({"base": half, "sft": tenth, "ppo": half}, [])
    assert warnings == ["ppo did not end 50% of its completions within the length limit"]


AWKWARD = 'a | b\nc <script>alert("x")</script> \\ d\r\n\n| --- |'


def test_markdown_escapes_what_models_write():
    report = make_report({"sft": BAD, "ppo": GOOD}, name="a|b\n<script>")
    plain = to_markdown(report, [{"prompt": "p", "sft": "s", "ppo": "t"}])
    found = to_markdown(report, [{"prompt": "p", "sft": AWKWARD, "ppo": "t"}])
    assert len(found.splitlines()) == len(plain.splitlines())  # one line for each row, whatever is in it
    assert "<script" not in found
    row = next(line for line in found.splitlines() if "alert" in line)
    assert row.startswith("| p | a \\| b c &lt;script>") and "\\\\ d" in row
    assert row.replace("\\\\", "").replace("\\|", "").count("|") == 4  # the edges of three cells
    assert "| name | a\\|b &lt;script> |" in found


def test_markdown_shows_every_figure():
    report = make_report({"base": BAD, "sft": MIXED, "ppo": GOOD}, metrics=(BLEU, TER), seed=3)
    found = to_markdown(report, [{"prompt": "p", "ppo": "t"}])
    assert found.startswith(f"# Evaluation\n\n{report.verdict}\n")
    rows: dict[str, str] = {}
    for line in found.splitlines():
        if line.startswith("|"):
            rows.setdefault(line.split("|")[1].strip(), line)
    score = report.systems["ppo"].metrics["bleu"]
    assert f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]" in rows["bleu"]
    assert rows["mean reward"] == "| mean reward | 0.5000 | 0.5000 | 0.5000 |"
    assert rows["cumulative reward"] == "| cumulative reward | 6.00 | 6.00 | 6.00 |"
    assert rows["KL to SFT, nats/completion"].count("0.500") == 3
    assert "ppo - sft" in rows and "| seed | 3 |" in found and score.signature.replace("|", "\\|") in found


def test_the_terminal_shows_the_same():
    report = make_report({"sft": MIXED, "ppo": MIXED})
    output = StringIO()
    print_report(report, Console(width=200, file=output))
    text = output.getvalue()
    assert report.verdict in text and f"warning: {report.warnings[0]}" in text
    assert "Test scores" in text and "Comparisons" in text


def test_predictions_file(answer, sft, examples, tmp_path):
    found = answer(sft, sft)
    rewards = {"a": [0.25] * 5 + [math.nan]}
    file = tmp_path / "new" / "sft.jsonl"
    save_predictions(file, found, examples, rewards, [0.5] * 6)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text(encoding="utf-8").splitlines()]
    for line, item in zip(lines, found, strict=True):
        row = examples[item.index]
        assert line["prompt"] == row["prompt"] and line["references"] == row["references"]
        assert {key: line[key] for key in asdict(item)} == asdict(item)
        assert line["score"] == 0.5
    assert [line["rewards"]["a"] for line in lines] == [0.25] * 5 + [None]
    save_predictions(file, found, examples, {}, [])
    assert json.loads(file.read_text().splitlines()[0])["score"] is None
