"""Token by token against the model's own outputs."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.evaluation.gains import find_gains
from pipeline.evaluation.inspection import (
    attention_to_prompt,
    chosen_examples,
    compare_passage,
    inspect_examples,
    token_texts,
    token_values,
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


def test_values_come_from_the_head_beside_the_policy(models, pair, tmp_path):
    prompt, completion = pair
    head, file = torch.nn.Linear(32, 1), tmp_path / "value_head.safetensors"
    assert token_values(models[1], 0, file, prompt, completion) is None
    save_file(head.state_dict(), file)
    states = models[1].base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
    expected = head(states[len(prompt) - 1 : -1]).squeeze(-1)
    assert token_values(models[1], 0, file, prompt, completion).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    save_file(torch.nn.Linear(7, 1).state_dict(), file)
    assert token_values(models[1], 0, file, prompt, completion) is None


def test_an_inspection_has_all_of_it(models, pair, tokenizer, examples, tmp_path):
    save_file(torch.nn.Linear(32, 1).state_dict(), tmp_path / "head.safetensors")
    written = ([pair[1]], [pair[1]])
    given = []

    def advantages(index, values, ppo, sft):
        given.append((index, values.shape, ppo.shape, sft.shape))
        return [0.5] * len(values)

    (found,) = inspect_examples(
        models, tokenizer, examples, [(0, "why")], written, tmp_path / "head.safetensors", advantages
    )
    count = len(pair[1])
    assert given == [(0, (count,), (1, count), (1, count))]
    assert [p.title for p in found.passages] == ["reference", "SFT's completion", "PPO's completion"]
    assert found.credit.advantages == [0.5] * count and found.attention is not None
    assert found.prompt == examples[0]["prompt"]


def test_examples_are_chosen_in_turn_and_none_twice():
    texts = (list("abcd"), list("wxyz"))
    gains = find_gains("sft", "ppo", "bleu", [0.0] * 4, [0.9, -0.5, 0.12, 0.2], texts, ["w"] * 4)
    assert chosen_examples(gains, 3) == [(0, "a large gain"), (1, "a large loss"), (2, "a typical change")]
    assert [index for index, _ in chosen_examples(gains, 9)] == [0, 1, 2, 3]
    assert chosen_examples(None, 3) == chosen_examples(gains, 0) == []


def test_white_space_is_visible(tokenizer):
    assert token_texts(tokenizer, tokenizer("a\nb", add_special_tokens=False)["input_ids"]) == [" ", "a", "⏎", "b"]
