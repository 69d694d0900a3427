"""The figures of each prediction against direct computation."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from evaluation_toys import prediction

from pipeline.evaluation import predictions, systems
from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.predictions import cross_entropy, predict, save_predictions
from pipeline.evaluation.systems import Answering, predict_system
from pipeline.models import generation
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_model
from pipeline.models.sequences import length_sorted_blocks
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.runtime.memory import BatchSize


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
    """Predictions of a model for six of the examples."""
    rows = examples.select(range(10))
    rows = rows.remove_columns("references").add_column("references", [[*r, "another"] for r in rows["references"]])
    indices = [7, 0, 3, 9, 1, 4]
    return lambda model, size=4: predict(model, tokenizer, rows, indices, Decoding(6), BatchSize(size))


@torch.no_grad()
def log_softmax(model, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def test_cross_entropy_is_that_of_the_first_reference(answer, changed, examples, tokenizer):
    found = answer(changed)
    assert [p.index for p in found] == [7, 0, 3, 9, 1, 4]
    total = tokens = 0
    for item in found:
        row = examples[item.index]
        prompt = encode_prompts(tokenizer, [row["prompt"]])[0]
        reference = encode_completions(tokenizer, [row["prompt"]], [row["references"][0]])[0]
        logprobs = log_softmax(changed, prompt + reference)
        nats = -sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(reference))
        assert item.reference_nats == pytest.approx(nats, rel=1e-5)
        assert item.reference_tokens == len(reference)  # EOS included
        total, tokens = total + nats, tokens + len(reference)
    value, perplexity = cross_entropy(found)
    assert value == pytest.approx(total / tokens, rel=1e-5)  # by token, not by example
    assert perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_cross_entropy_by_hand():
    first = prediction(reference_nats=6.0, reference_tokens=2)
    second = prediction(reference_nats=2.0, reference_tokens=6)
    assert cross_entropy([first, second]) == (1.0, math.e)


def test_predictions_do_not_depend_on_the_batch_size(answer, changed):
    for one, many in zip(answer(changed, 1), answer(changed, 6), strict=True):
        assert (one.index, one.completion_ids) == (many.index, many.completion_ids)
        assert one.reference_nats == pytest.approx(many.reference_nats, rel=1e-5)


def test_batches_are_halved_where_memory_runs_out(examples, changed, tokenizer, monkeypatch, capsys):
    """In writing and in scoring, and from then on for good; the predictions stay the same."""
    rows, written, scored, batches = examples.select(range(8)), [], [], BatchSize(8)
    expected = predict(changed, tokenizer, rows, range(8), Decoding(6), BatchSize(2))

    def failing(function: Callable, argument: int, calls: list[int], limit: int) -> Callable:
        def call(*arguments):
            calls.append(len(arguments[argument]))
            if calls[-1] > limit:
                raise torch.OutOfMemoryError("out of memory")
            return function(*arguments)

        return call

    monkeypatch.setattr(generation, "decode_batch", failing(generation.decode_batch, 1, written, 4))
    logprobs = failing(predictions.completion_logprobs, 1, scored, 2)
    monkeypatch.setattr(predictions, "completion_logprobs", logprobs)
    found = [predict(changed, tokenizer, rows, range(8), Decoding(6), batches) for _ in range(2)]
    assert (written, scored, batches.rows) == ([8, 4, 4, 2, 2, 2, 2], [4, 2, 2, 2, 2, 2, 2, 2, 2], 2)
    assert found[0] == found[1]
    for one, other in zip(found[0], expected, strict=True):
        assert replace(one, reference_nats=0.0) == replace(other, reference_nats=0.0)
        assert one.reference_nats == pytest.approx(other.reference_nats, rel=1e-5)
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "from now on 4 rows at once instead of 8",
        "from now on 2 rows at once instead of 4",
    ]


def test_prompts_of_all_blocks_wait_together_where_rows_are_refilled(examples, changed, tokenizer, monkeypatch):
    """Greedy texts and the likelihoods of references stay the same to the bit; samples keep the seeds of blocks."""
    settings = EvalConfig(max_new_tokens=6, per_device_eval_batch_size=4, samples_per_prompt=0)
    found, asked, decode_static = [], [], generation.decode_static

    def decode(model, prompts, *arguments, at_once):
        asked.append((len(prompts), at_once))
        return decode_static(model, prompts, *arguments, at_once=at_once)

    monkeypatch.setattr(generation, "decode_static", decode)
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(generation, "STATIC_DEVICES", devices)
        given = (changed, tokenizer), examples.select(range(11)), Answering(settings), BatchSize(4)
        found.append(predict_system("sft", None, *given))
    assert asked == [(11, 4), (4, 4), (4, 4), (3, 4)]
    assert found[0] == found[1]


def test_blocks_of_each_process_are_joined(monkeypatch):
    blocks = [[4, 1], [0, 3], [2, 5], [6]]
    joined = {1: [[4, 1, 0, 3, 2, 5, 6]], 3: [[4, 1, 6], [0, 3], [2, 5]], 8: blocks}
    for processes, expected in joined.items():
        state = SimpleNamespace(num_processes=processes)
        monkeypatch.setattr(systems, "PartialState", lambda state=state: state)
        assert systems._joined(blocks) == expected


def test_finished_means_that_eos_was_written(answer, base_directory, model_config, sft, tokenizer):
    for found in (answer(sft), answer(load_model(base_directory, model_config).eval())):
        for p in found:
            assert p.finished == (p.completion_ids[-1] == tokenizer.eos_token_id)
            assert p.finished or len(p.completion_ids) == 6
            assert "</s>" not in p.completion
    assert any(p.finished for p in answer(sft))


def test_blocks_are_of_all_rows_and_alike_in_length(examples, tokenizer):
    rows = examples.select(range(11))
    prompts = encode_prompts(tokenizer, rows["prompt"])
    blocks = length_sorted_blocks([len(ids) for ids in prompts], 2)
    lengths = [len(prompts[row]) for block in blocks for row in block]
    assert sorted(row for block in blocks for row in block) == list(range(11))
    assert [len(block) for block in blocks] == [2, 2, 2, 2, 2, 1]
    assert lengths == sorted(lengths)


def test_predictions_file(answer, sft, examples, tmp_path):
    found = answer(sft)
    rewards = {"a": [0.25] * 5 + [math.nan]}
    file = tmp_path / "new" / "sft.jsonl"
    save_predictions(file, found, examples, rewards, [0.5] * 6, {"bleu": [0.1] * 6})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text(encoding="utf-8").splitlines()]
    for line, item in zip(lines, found, strict=True):
        row = examples[item.index]
        assert line["prompt"] == row["prompt"] and line["references"] == row["references"]
        assert {key: line[key] for key in asdict(item)} == asdict(item)
        assert line["score"] == 0.5 and line["metrics"] == {"bleu": 0.1}
    assert [line["rewards"]["a"] for line in lines] == [0.25] * 5 + [None]
    save_predictions(file, found, examples, {}, [], {}, [0, 0, 1, 1, 2, 2])
    assert [json.loads(line)["cluster"] for line in file.read_text().splitlines()] == [0, 0, 1, 1, 2, 2]
    save_predictions(file, found, examples, {}, [], {})
    assert json.loads(file.read_text().splitlines()[0])["score"] is None
