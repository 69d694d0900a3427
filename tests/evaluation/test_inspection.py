"""Token by token against the model's own outputs."""

import pytest
import torch

from pipeline.evaluation.gains import find_gains
from pipeline.evaluation.inspection import (
    attention_to_prompt,
    chosen_examples,
    compare_passage,
    inspect_examples,
    token_texts,
)
from pipeline.models.text import encode_prompts


@pytest.fixture
def models(taught):
    sft, ppo = taught().eval(), taught().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ppo.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return sft, ppo


@pytest.fixture
def pair(tokenizer, examples):
    prompt = encode_prompts(tokenizer, [examples[0]["prompt"]])[0]
    return prompt, [*tokenizer("red two", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_tokens_have_their_log_probs_under_both(models, pair, tokenizer):
    prompt, completion = pair
    found = compare_passage("reference", prompt, completion, *models, tokenizer)
    for model, name in zip(models, ("sft", "ppo"), strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        expected = torch.log_softmax(logits, -1)[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]
        assert [getattr(token, name) for token in found.tokens] == pytest.approx(expected.tolist(), abs=1e-4)
    assert "".join(token.text for token in found.tokens) == " red two</s>"
    assert found.tokens[0].change == found.tokens[0].ppo - found.tokens[0].sft != 0


def test_attention_is_that_of_the_position_that_writes_the_token(models, pair, tokenizer):
    prompt, completion = pair
    found = attention_to_prompt(models[1], tokenizer, prompt, completion)
    ids = torch.tensor([prompt + completion])
    (layer,) = models[1](input_ids=ids, output_attentions=True).attentions
    row = layer[0].mean(0)[len(prompt) - 1 + 1, : len(prompt)]  # where the second token is written
    assert found.weights[1] == pytest.approx(row.tolist(), abs=1e-5)
    assert sum(found.weights[0]) == pytest.approx(1, abs=1e-5)  # nothing but the prompt to look at yet
    assert (len(found.weights), len(found.prompt)) == (len(completion), len(prompt))


def test_an_inspection_has_all_of_it(models, pair, tokenizer, examples):
    (found,) = inspect_examples(models, tokenizer, examples, [(0, "why")], ([pair[1]], [pair[1]]))
    assert [p.title for p in found.passages] == ["reference", "SFT's completion", "PPO's completion"]
    assert len(found.passages[2].tokens) == len(found.attention.weights) == len(pair[1])
    assert found.prompt == examples[0]["prompt"] and found.reason == "why"


def test_a_reference_is_read_as_far_as_the_model_has_positions(models, pair, tokenizer, examples):
    for model in models:
        model.config.max_position_embeddings = len(pair[0]) + 1
    (found,) = inspect_examples(models, tokenizer, examples, [(0, "why")], ([pair[1][:1]], [pair[1][:1]]))
    assert len(found.passages[0].tokens) == 1


def test_examples_are_chosen_in_turn_and_none_twice():
    texts = (list("abcd"), list("wxyz"))
    gains = find_gains("sft", "ppo", "bleu", [0.0] * 4, [0.9, -0.5, 0.12, 0.2], texts, ["w"] * 4)
    assert chosen_examples(gains, 3) == [(0, "a large gain"), (1, "a large loss"), (2, "a typical change")]
    assert [index for index, _ in chosen_examples(gains, 9)] == [0, 1, 2, 3]
    assert chosen_examples(None, 3) == chosen_examples(gains, 0) == []


def test_white_space_is_visible(tokenizer):
    assert token_texts(tokenizer, tokenizer("a\nb", add_special_tokens=False)["input_ids"]) == [" ", "a", "⏎", "b"]
