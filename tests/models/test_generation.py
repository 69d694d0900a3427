"""Completions: where they end, what decides them, and that they stand where their prompts do."""

import pytest
import torch

from pipeline.models.generation import Decoding, eos_token_ids, generate
from pipeline.models.loading import load_model
from pipeline.models.text import encode_prompts

PROMPTS = ["say north", "say north east south west east", "say west", "say east south", "say south south west"]
GREEDY = Decoding(max_new_tokens=8)
SAMPLED = Decoding(max_new_tokens=8, temperature=1.0)


@pytest.fixture
def model(taught):
    return taught().eval()


@pytest.fixture
def prompts(tokenizer):
    return encode_prompts(tokenizer, PROMPTS)


def sample(model, tokenizer, prompts, seed: int, decoding: Decoding = SAMPLED) -> list[list[int]]:
    torch.manual_seed(seed)
    return generate(model, tokenizer, prompts, decoding, 8)


def test_completions_end_with_eos_or_at_the_limit(model, tokenizer, prompts):
    found = generate(model, tokenizer, prompts * 4, SAMPLED, 8)
    finished = [ids for ids in found if tokenizer.eos_token_id in ids]
    assert finished
    assert all(ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id for ids in finished)
    assert all(len(ids) == 8 for ids in found if ids not in finished)


def test_every_declared_eos_stops(model, tokenizer, prompts):
    plain = generate(model, tokenizer, prompts, GREEDY, 8)
    other = plain[0][-2]  # the last word of the first completion becomes a second end
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert eos_token_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, other])
    stopped = generate(model, tokenizer, prompts, GREEDY, 8)
    assert stopped == [ids[: ids.index(other) + 1] if other in ids else ids for ids in plain]
    assert len(stopped[0]) < len(plain[0])


@pytest.mark.parametrize("declared", [None, 7, [7]])
def test_the_tokenizers_eos_always_counts(model, tokenizer, declared):
    model.generation_config.eos_token_id = declared
    assert tokenizer.eos_token_id in eos_token_ids(model, tokenizer)
    assert (7 in eos_token_ids(model, tokenizer)) == (declared is not None)


def test_saved_generation_settings_neither_leak_nor_change(model, tokenizer, prompts):
    greedy, sampled = generate(model, tokenizer, prompts, GREEDY, 8), sample(model, tokenizer, prompts, 3)
    written = sorted({token for ids in greedy for token in ids})
    model.generation_config.update(
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=written,
        forced_bos_token_id=5,
        forced_eos_token_id=6,
        min_new_tokens=8,
        num_beams=3,
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        max_length=3,
        max_new_tokens=2,
    )
    saved = model.generation_config.to_dict()
    for decoding, expected in ((GREEDY, greedy), (SAMPLED, sampled)):
        assert sample(model, tokenizer, prompts, 3, decoding) == expected
    assert model.generation_config.to_dict() == saved


def test_saved_settings_survive_a_failure(model, tokenizer, prompts, monkeypatch):
    saved = model.generation_config

    def fail(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError):
        generate(model, tokenizer, prompts, Decoding(max_new_tokens=8, num_beams=2), 8)
    assert model.generation_config is saved


def test_results_stand_in_the_order_of_the_prompts(model, tokenizer, prompts):
    alone = [generate(model, tokenizer, [prompt], GREEDY, 1)[0] for prompt in prompts]
    assert len({tuple(ids) for ids in alone}) > 2  # or nothing would be shown
    assert generate(model, tokenizer, prompts, GREEDY, 8) == alone
    assert generate(model, tokenizer, prompts[::-1], GREEDY, 2) == alone[::-1]


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beam_search_do_not_depend_on_the_batch_size(model, tokenizer, prompts, beams):
    decoding = Decoding(max_new_tokens=8, num_beams=beams)
    assert generate(model, tokenizer, prompts, decoding, 1) == generate(model, tokenizer, prompts, decoding, 5)


def test_pad_may_equal_eos(model, tokenizer, prompts):
    plain = generate(model, tokenizer, prompts, GREEDY, 8)
    tokenizer.pad_token = tokenizer.eos_token
    assert generate(model, tokenizer, prompts, GREEDY, 8) == plain


def test_sampling_follows_the_seed(model, tokenizer, prompts):
    assert sample(model, tokenizer, prompts, 1) == sample(model, tokenizer, prompts, 1)
    assert sample(model, tokenizer, prompts, 1) != sample(model, tokenizer, prompts, 2)


def test_narrow_sampling_is_greedy(model, tokenizer, prompts):
    greedy = generate(model, tokenizer, prompts, GREEDY, 8)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        decoding = Decoding(**{"max_new_tokens": 8, "temperature": 1.0, **options})
        assert sample(model, tokenizer, prompts, 1, decoding) == greedy
    assert sample(model, tokenizer, prompts, 1) != greedy


def test_sampling_draws_from_the_whole_vocabulary(base_directory, model_config, tokenizer, prompts):
    model = load_model(base_directory, model_config).eval()  # random weights: nearly uniform over 320 tokens
    found = sample(model, tokenizer, prompts[:1] * 100, 0)
    assert len({ids[0] for ids in found}) > 60  # transformers' own top_k of 50 would leave about 50


@pytest.mark.parametrize("limit", [1, 3])
def test_the_length_limit_holds(model, tokenizer, prompts, limit):
    for found in (
        generate(model, tokenizer, prompts, Decoding(limit), 8),
        sample(model, tokenizer, prompts, 0, Decoding(limit, temperature=1.0)),
    ):
        assert all(1 <= len(ids) <= limit for ids in found)
        assert all(len(ids) == limit for ids in found if ids[-1] != tokenizer.eos_token_id)
