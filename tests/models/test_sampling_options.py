"""`min_p`, `repetition_penalty` and suppressed tokens: numbers by hand, transformers' own, and any batch alike."""

import pytest
import torch
from test_decoding import PROMPTS, build
from transformers import GenerationConfig, LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from pipeline.models import generation
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.generation import Decoding, generate, seed_samples
from pipeline.models.kernels.lm_head import LogitTransform, suppression, token_logprobs
from pipeline.models.loading import lora_config
from pipeline.models.sampling import TokenChooser, penalise_repetition, sample_tokens
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel

SAMPLED = {
    "min_p": Decoding(8, 1.0, min_p=0.7),
    "penalty": Decoding(8, 1.0, repetition_penalty=1.5),
    "suppressed": Decoding(8, 1.0, suppress_tokens=(3, 5, 8)),
    "all": Decoding(8, 0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2, suppress_tokens=(3, 5)),
}


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(6, 1)
    draws = torch.tensor([0.0, 0.09, 0.11, 0.31, 0.59, 0.99])
    # At least 0.6 of 0.4: 0.3 and 0.4 are left, of 0.7 together.
    assert sample_tokens(logits, Decoding(1, 1.0, min_p=0.6), draws).tolist() == [2, 2, 2, 2, 3, 3]
    # At temperature 0.5 the weights are 1, 4, 9, 16 of 30, and 9 is below 0.6 of 16.
    assert sample_tokens(logits, Decoding(1, 0.5, min_p=0.6), draws).tolist() == [3] * 6
    # Likeliest first, as top_k sorts them.
    assert sample_tokens(logits, Decoding(1, 1.0, top_k=3, min_p=0.6), draws).tolist() == [3, 3, 3, 3, 2, 2]


def test_a_token_that_was_read_is_less_likely():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]
    assert penalise_repetition(logits, seen, 0.5).tolist() == [[4.0, -1.0, 2.0, -2.0]]  # below 1 it is rewarded


def test_both_are_those_of_transformers():
    torch.manual_seed(0)
    logits, ids = 3 * torch.randn(5, 40), torch.randint(40, (5, 9))
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter_(1, ids, True)
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), MinPLogitsWarper(0.1)])(ids, logits)
    draws = torch.rand(5)
    ours = sample_tokens(penalise_repetition(logits, seen, 1.3), Decoding(1, 1.0, min_p=0.1), draws)
    assert ours.tolist() == sample_tokens(theirs, Decoding(1, 1.0), draws).tolist()


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_the_likeliest_of_the_penalised_tokens_are_those_of_transformers(architecture):
    model = build(architecture)
    prefix = decoder_prefix(model)  # the start and the forced token are written too
    settings = {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_bos_token_id": 7}
    if not prefix:
        del settings["forced_bos_token_id"]
    config = GenerationConfig(
        max_new_tokens=8 + len(prefix[1:]), repetition_penalty=1.5, suppress_tokens=[3], **settings
    )
    saved, model.generation_config = model.generation_config, config
    theirs = [model.generate(torch.tensor([prompt]))[0].tolist() for prompt in PROMPTS]
    model.generation_config = saved
    skipped = [len(prefix) or len(prompt) for prompt in PROMPTS]
    penalised = Decoding(8, 1.0, top_k=1, repetition_penalty=1.5, suppress_tokens=(3,))
    ours = generate(model, Tokenizer, PROMPTS, penalised, 4)
    assert ours == [ids[start:] for ids, start in zip(theirs, skipped, strict=True)]
    assert ours != generate(model, Tokenizer, PROMPTS, Decoding(8, 1.0, top_k=1, suppress_tokens=(3,)), 4)


class Tokenizer:
    """All that `generate` reads of a tokenizer where there are no stop strings."""

    eos_token_id, pad_token_id, bos_token_id = 2, 0, 1


@pytest.mark.parametrize("decoding", SAMPLED.values(), ids=SAMPLED)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_row_is_sampled_alike_in_any_company(architecture, decoding):
    model, rows = build(architecture), []
    for size in (1, 2, 6):
        torch.manual_seed(1)
        rows.append(generate(model, Tokenizer, PROMPTS, decoding, size))
    assert rows[0] == rows[1] == rows[2]
    assert not {token for ids in rows[0] for token in ids} & set(decoding.suppress_tokens)
    torch.manual_seed(1)
    assert rows[0] != generate(model, Tokenizer, PROMPTS, Decoding(8, decoding.temperature), 6)


def test_the_penalty_counts_the_prompt_and_what_was_written():
    model = build("llama")
    free = generate(model, Tokenizer, PROMPTS, Decoding(8, 1.0, top_k=1, suppress_tokens=(2,)), 6)
    shy = generate(
        model, Tokenizer, PROMPTS, Decoding(8, 1.0, top_k=1, repetition_penalty=1e9, suppress_tokens=(2,)), 6
    )
    repeats = [len(ids) - len(set(ids)) + len(set(ids) & set(p)) for ids, p in zip(free, PROMPTS, strict=True)]
    assert sum(repeats) > 0
    assert all(len(set(ids)) == 8 and not set(ids) & set(prompt) for ids, prompt in zip(shy, PROMPTS, strict=True))


@pytest.mark.parametrize("decoding", [Decoding(8), Decoding(8, num_beams=2), Decoding(8, 1.0)], ids=str)
def test_suppressed_tokens_are_in_no_completion(decoding, monkeypatch):
    model = build("llama")
    usual = {token for ids in generate(model, Tokenizer, PROMPTS, decoding, 6) for token in ids} - {2}
    suppressed = Decoding(**{**vars(decoding), "suppress_tokens": tuple(usual)})
    assert usual and not {t for ids in generate(model, Tokenizer, PROMPTS, suppressed, 6) for t in ids} & usual
    monkeypatch.setattr(generation, "supports_decode_loop", lambda model: False)
    seed_samples(model, suppressed, 0, 0, 6)
    assert not {t for ids in generate(model, Tokenizer, PROMPTS, suppressed, 6) for t in ids} & usual


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_log_probs_are_those_of_the_tokens_that_are_left(trained):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 9).requires_grad_(trained)
    hidden = torch.randn(5, 6, requires_grad=True)
    targets = torch.tensor([0, 1, 3, 5, 8])
    transform = LogitTransform(cap=2.0, suppressed=suppression(9, [2, 4]))
    logprobs, entropies = token_logprobs(head, hidden, targets, 9, 0.7, False, transform)
    kept = [0, 1, 3, 5, 6, 7, 8]
    expected = (2 * torch.tanh(head(hidden)[:, kept] / 2) / 0.7).log_softmax(-1)
    by_hand = expected[torch.arange(5), torch.tensor([kept.index(token) for token in targets.tolist()])]
    torch.testing.assert_close(logprobs, by_hand)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1))
    (ours,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    (theirs,) = torch.autograd.grad(by_hand.sum(), hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_peft", [True, False])
def test_policy_and_reference_suppress_alike(taught, model_config, use_peft):
    shared = SharedModel(taught(), lora_config(model_config) if use_peft else None, suppress_tokens=(7, 9))
    sequences = make_sequences([[5, 6], [8]], [[10, 11, 2], [12, 2]], 0)
    mask = sequences.completion_mask
    logprobs = shared(sequences).logprobs
    torch.testing.assert_close(logprobs[mask], shared.reference_logprobs(sequences)[0][mask], rtol=0, atol=0)
    free = SharedModel(taught(), lora_config(model_config) if use_peft else None)(sequences).logprobs
    assert (logprobs[mask] >= free[mask]).all() and (logprobs[mask] > free[mask]).any()
    assert not [name for name in shared.state_dict() if "logit_offset" in name]  # nothing of it is saved


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_rows_of_different_lengths_choose_as_each_would_alone(temperature):
    """Three rows with no, one and four tokens: ends, first tokens and penalties are those of their own lengths."""
    torch.manual_seed(0)
    logits, draws, read = torch.randn(3, 12), torch.rand(3, 6) if temperature else None, [[3], [4, 5], [6]]
    decoding = Decoding(6, temperature, 0, 1.0, 1, 3, (), (7,), 0.0, 2.0, (8, 9))
    logits[:, 7], logits[:2, 2], logits[0, 8], logits[2, 2], logits[1, 8] = 90.0, 80.0, 60.0, 70.0, 60.0
    lengths, rows = torch.tensor([0, 1, 4]), torch.arange(3)
    together = TokenChooser(decoding, [2], read, draws)(logits.clone(), lengths, rows)
    alone = [
        TokenChooser(decoding, [2], read, draws)(logits[row : row + 1].clone(), int(lengths[row]), rows[row : row + 1])
        for row in range(3)
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    # The first row writes neither an end nor 8; the second writes 8 rather than an end; the third may end.
    assert together[0] not in (2, 7, 8, 9) and together[1:].tolist() == [8, 2]
