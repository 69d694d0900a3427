"""Figures and views of an encoder-decoder against its own forward pass."""

import pytest
import torch

from pipeline.evaluation.inspection import attention_to_prompt, compare_passage
from pipeline.evaluation.predictions import predict
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.generation import Decoding
from pipeline.models.likelihood import entropy_and_divergence
from pipeline.models.sequences import make_sequences
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.runtime.memory import BatchSize

FORCED = 40  # a token that is given, as a language code


@pytest.fixture(params=[None, FORCED], ids=["start", "forced"])
def models(taught_t5, request):
    sft, ppo = taught_t5().eval(), taught_t5().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ppo.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for model in (sft, ppo):
        model.generation_config.forced_bos_token_id = request.param
    return sft, ppo


@torch.no_grad()
def log_softmax(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[C, V] by one example, without padding."""
    read = torch.tensor([decoder_prefix(model) + completion[:-1]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0]
    return torch.log_softmax(logits[len(decoder_prefix(model)) - 1 :].double(), -1)


def test_figures_of_predictions(models, examples, t5_tokenizer):
    _, ppo = models
    found = predict(ppo, t5_tokenizer, examples, [3, 0, 5, 8], Decoding(6), BatchSize(3))
    assert [p.index for p in found] == [3, 0, 5, 8]
    for item in found:
        row = examples[item.index]
        prompt = encode_prompts(t5_tokenizer, [row["prompt"]], True)[0]
        assert prompt[-1] == t5_tokenizer.eos_token_id
        reference = encode_completions(t5_tokenizer, [row["prompt"]], row["references"])[0]
        nats = -log_softmax(ppo, prompt, reference).gather(-1, torch.tensor(reference).unsqueeze(-1)).sum()
        assert item.reference_nats == pytest.approx(float(nats), rel=1e-4) and item.reference_tokens == len(reference)
        assert log_softmax(ppo, prompt, item.completion_ids).argmax(-1).tolist() == item.completion_ids  # greedy
        assert item.finished == (item.completion_ids[-1] == t5_tokenizer.eos_token_id)


def test_entropy_and_divergence(models, examples, t5_tokenizer):
    sft, ppo = models
    prompts = encode_prompts(t5_tokenizer, examples["prompt"][:3], True)
    completions = encode_completions(t5_tokenizer, [""] * 3, examples["references"][0] * 2 + ["red"])
    sequences = make_sequences(prompts, completions, t5_tokenizer.pad_token_id)
    entropies, divergences = entropy_and_divergence(ppo, sequences, 0.7, sft)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        own, theirs = ((log_softmax(m, prompt, completion) / 0.7).log_softmax(-1) for m in (ppo, sft))
        count = len(completion)
        assert entropies[row, :count].tolist() == pytest.approx((-own.exp() * own).sum(-1).tolist(), rel=1e-4)
        kl = (own.exp() * (own - theirs)).sum(-1)
        assert divergences[row, :count].tolist() == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
        assert not entropies[row, count:].any() and not divergences[row, count:].any()


def test_views_of_one_example(models, examples, t5_tokenizer):
    sft, ppo = models
    prompt = encode_prompts(t5_tokenizer, [examples[0]["prompt"]], True)[0]
    completion = encode_completions(t5_tokenizer, [""], ["red two"])[0]
    passage = compare_passage("reference", prompt, completion, sft, ppo, t5_tokenizer)
    for model, name in ((sft, "sft"), (ppo, "ppo")):
        expected = (
            log_softmax(model, prompt, completion).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        )
        assert [getattr(token, name) for token in passage.tokens] == pytest.approx(expected.tolist(), abs=1e-4)

    prefix = decoder_prefix(ppo)
    read = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([prefix + completion[:-1]])}
    seen = attention_to_prompt(ppo, t5_tokenizer, prompt, completion)
    (layer,) = ppo(**read, output_attentions=True).cross_attentions
    rows = layer[0].mean(0)[len(prefix) - 1 :]
    assert len(seen.weights) == len(completion) and len(seen.prompt) == len(prompt)
    for found, wanted in zip(seen.weights, rows.tolist(), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5) and sum(found) == pytest.approx(1, abs=1e-5)
