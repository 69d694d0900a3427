"""The figures of each prediction against direct computation."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from evaluation_toys import prediction

from pipeline.evaluation.predictions import cross_entropy, length_sorted_blocks, predict, save_predictions
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_model
from pipeline.models.text import encode_completions, encode_prompts


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


def test_kl_to_sft_is_the_sum_over_positions_of_the_full_divergence(answer, changed, sft, examples, tokenizer):
    for found in answer(changed, sft):
        prompt = encode_prompts(tokenizer, [examples[found.index]["prompt"]])[0]
        p = log_softmax(changed, prompt + found.completion_ids)[len(prompt) - 1 : -1]
        q = log_softmax(sft, prompt + found.completion_ids)[len(prompt) - 1 : -1]
        assert p.shape[0] == len(found.completion_ids)
        assert found.kl_to_sft == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4, abs=1e-6)
        assert found.kl_to_sft > 0.01


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


def test_entropy_is_the_sum_over_positions(answer, changed, examples, tokenizer):
    for found in answer(changed):
        prompt = encode_prompts(tokenizer, [examples[found.index]["prompt"]])[0]
        p = log_softmax(changed, prompt + found.completion_ids)[len(prompt) - 1 : -1]
        assert found.entropy == pytest.approx(-float((p.exp() * p).sum()), rel=1e-4)


def test_blocks_give_what_one_call_gives(examples, changed, sft, tokenizer):
    """Batches are the same whoever computes them, so the figures are the same bit for bit."""
    rows = examples.select(range(11))
    blocks = length_sorted_blocks([len(ids) for ids in encode_prompts(tokenizer, rows["prompt"])], 2)
    order = [row for block in blocks for row in block]
    assert sorted(order) == list(range(11))
    apart = [p for block in blocks for p in predict(changed, tokenizer, rows, block, Decoding(6), 2, sft)]
    assert apart == predict(changed, tokenizer, rows, order, Decoding(6), 2, sft)


def test_predictions_file(answer, sft, examples, tmp_path):
    found = answer(sft, sft)
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
    save_predictions(file, found, examples, {}, [], {})
    assert json.loads(file.read_text().splitlines()[0])["score"] is None
