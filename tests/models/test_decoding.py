"""The decode loop against transformers' generate, its sampling against numbers by hand, and what decides an end."""

import inspect
from collections.abc import Callable
from functools import wraps

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from pipeline.models import generation
from pipeline.models.generation import Decoding, generate
from pipeline.models.kernels import decode_loop as decoding
from pipeline.models.kernels.decode_loop import (
    PreallocatedCacheLayer,
    cache_argument,
    decode_batch,
    supports_decode_loop,
)
from pipeline.models.sampling import BLOCK, invert_cumulative, sample_tokens
from pipeline.models.sequences import pad_left, pad_right
from pipeline.models.text import encode_prompts

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12], [9], [13, 14, 15, 16, 17, 18, 19], [20, 21]]
TEXTS = ["say north", "say north east south west east", "say west"]
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {**COMMON, "num_key_value_heads": 2},
    "qwen2": {**COMMON, "num_key_value_heads": 2},
    "gemma": {**COMMON, "num_key_value_heads": 1, "head_dim": 16},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48},
    "gpt_neox": COMMON,
    "cohere": {**COMMON, "num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {**COMMON, "num_key_value_heads": 2, "embedding_multiplier": 3.0, "logits_scaling": 4.0},
}
UNTIED = {**COMMON, "tie_word_embeddings": False}  # tied and random, they would repeat one token for ever
WINDOWS = {
    "mistral": {**COMMON, "num_key_value_heads": 2, "sliding_window": 4},
    "cohere2": {**COMMON, "head_dim": 8, "sliding_window": 4, "logit_scale": 0.25},
    "gemma2": {**UNTIED, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
    "gemma3_text": {**UNTIED, "head_dim": 8, "sliding_window": 4},
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 1}
ENCODER_DECODERS = {"t5": T5, "mt5": T5, "bart": BART, "mbart": BART, "marian": BART, "pegasus": BART, "m2m_100": BART}
MODELS |= ENCODER_DECODERS
CHUNKS = {
    **COMMON,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 4,
}


def build(architecture: str, **options) -> PreTrainedModel:
    """A random model whose next tokens are far from equally likely."""
    sizes = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
    config = AutoConfig.for_model(architecture, **{**sizes, **(MODELS | WINDOWS).get(architecture, COMMON), **options})
    torch.manual_seed(0)
    family = AutoModelForSeq2SeqLM if architecture in ENCODER_DECODERS else AutoModelForCausalLM
    model = family.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if architecture in ENCODER_DECODERS:
        model.generation_config.forced_bos_token_id = 7
    return model


def by_transformers(model: PreTrainedModel, prompts: list[list[int]], limit: int, ends: list[int]) -> list[list[int]]:
    seq2seq = model.config.is_encoder_decoder
    ids, mask = (pad_right if seq2seq else pad_left)(prompts, 0)
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=0)
    start = ids.shape[1]
    if seq2seq:  # the start and the forced token are written too
        start, config.decoder_start_token_id, config.forced_bos_token_id = 2, 1, 7
        config.max_new_tokens = limit + 1
    rows = model.generate(ids, attention_mask=mask.long(), generation_config=config)[:, start:].tolist()
    stops = [next((i for i, token in enumerate(row) if token in ends), limit) for row in rows]
    return [row[: stop + 1] for row, stop in zip(rows, stops, strict=True)]


def greedy(logits, step, rows):
    return logits.argmax(-1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [*MODELS, *WINDOWS])
def test_greedy_tokens_are_those_of_transformers(architecture, attention):
    if (architecture, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has only the eager attention of Gemma 2")
    model = build(architecture, attn_implementation=attention)
    assert supports_decode_loop(model)
    plain = by_transformers(model, PROMPTS, 40, [60])
    # Tokens that some rows write early and others late or never: rows leave at different times, past a cache block.
    ends = [plain[0][3], plain[2][20]]
    for stop in ([2], ends):
        assert decode_batch(model, PROMPTS, 0, 40, stop, greedy) == by_transformers(model, PROMPTS, 40, stop)
    # Random encoder-decoders soon repeat themselves; how their rows leave is tested below.
    assert architecture in ENCODER_DECODERS or len({len(row) for row in by_transformers(model, PROMPTS, 40, ends)}) > 2


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama4_text", CHUNKS),
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_head": 2, "n_layer": 1}),
    ],
)
def test_other_caches_and_positions_are_left_to_transformers(architecture, options, tokenizer, monkeypatch, capsys):
    generation.warn_of_slow_generation.cache_clear()
    model = build(architecture, **options)
    assert not supports_decode_loop(model)
    monkeypatch.setattr(generation, "decode_batch", None)
    monkeypatch.setattr(generation, "eos_token_ids", lambda *_: [2])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    assert generate(model, tokenizer, PROMPTS, Decoding(6, num_beams=2), 8)
    assert capsys.readouterr().err == ""  # beams are transformers' for every model
    for _ in range(2):
        assert generate(model, tokenizer, PROMPTS, Decoding(6), 8) == by_transformers(model, PROMPTS, 6, [2])
    [line] = capsys.readouterr().err.splitlines()  # once, not for every batch
    assert line.startswith(f"warning: {architecture}:") and "decode loop" in line


@pytest.mark.parametrize("architecture", WINDOWS)
def test_with_sliding_windows_a_text_is_what_full_passes_find_likeliest(architecture, tokenizer, monkeypatch, capsys):
    model = build(architecture)
    monkeypatch.setattr(generation, "eos_token_ids", lambda *_: [2])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    completions = generate(model, tokenizer, PROMPTS, Decoding(12), 8)
    assert capsys.readouterr().err == ""
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        written = []
        while len(written) < 12 and written[-1:] != [2]:  # without any cache or padding
            written.append(int(model(torch.tensor([prompt + written]), use_cache=False).logits[0, -1].argmax()))
        assert completion == written


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_the_cache_is_passed_under_the_name_that_the_forward_pass_gives_it(architecture, name):
    model = build(architecture)
    expected, library = decode_batch(model, PROMPTS, 0, 12, [2], greedy), cache_argument(model)
    forward, reader = model.forward, model.get_decoder() if architecture == "t5" else model.base_model
    model.forward = lambda **inputs: forward(**{library: inputs.pop(name)}, **inputs)
    reader.forward = with_renamed_argument(reader.forward, library, name)
    assert cache_argument(model) == name and supports_decode_loop(model)
    assert decode_batch(model, PROMPTS, 0, 12, [2], greedy) == expected
    reader.forward = with_renamed_argument(reader.forward, name, "memory")
    assert cache_argument(model) is None and not supports_decode_loop(model)


def with_renamed_argument(function: Callable, old: str, new: str) -> Callable:
    """`function` as it is, but with a signature that calls the argument `old` by another name."""

    @wraps(function)
    def renamed(*args, **kwargs):
        return function(*args, **kwargs)

    parameters = inspect.signature(function).parameters.values()
    renamed.__signature__ = inspect.Signature([p.replace(name=new) if p.name == old else p for p in parameters])
    return renamed


def test_finished_rows_are_no_longer_computed(monkeypatch):
    model = build("llama")
    rows, limit = [], 12
    model.register_forward_pre_hook(lambda _, args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    lengths = torch.tensor([3, 12, 1, 5, 5, 2])
    written = decode_batch(model, PROMPTS, 0, limit, [], greedy, lambda row, ids: ids.shape[1] >= lengths[row])
    assert [len(ids) for ids in written] == lengths.tolist()
    # Five distinct prompts are read; then as many rows as are still open, and nothing after the last.
    assert rows == [5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_a_decoder_may_have_more_or_fewer_layers_than_its_encoder(architecture, layers):
    name = {"t5": "num_decoder_layers", "bart": "decoder_layers"}[architecture]
    model = build(architecture, **{name: layers})
    found = decode_batch(model, PROMPTS, 0, 8, [2], greedy)
    rows = []
    for prompt in PROMPTS:  # without any cache
        written = [1, 7]
        while len(written) < 10 and written[-1] != 2:
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([written])}
            written.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
        rows.append(written[2:])
    assert found == rows


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_an_encoder_runs_once_for_each_prompt_and_not_for_any_token(architecture):
    model = build(architecture)
    encoded, decoded = [], []
    model.get_encoder().register_forward_pre_hook(
        lambda _, args, kw: encoded.append(len(kw["input_ids"])), with_kwargs=True
    )
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kw: decoded.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    lengths = torch.tensor([3, 6, 1, 5, 5, 2])
    written = decode_batch(model, PROMPTS, 0, 6, [], greedy, lambda row, ids: ids.shape[1] >= lengths[row])
    assert encoded == [5]  # distinct prompts
    # The start and the forced token once for each of them, then one token of every open row.
    assert decoded == [(5, 2), (5, 1), (4, 1), (3, 1), (3, 1), (1, 1)]
    whole = by_transformers(model, PROMPTS, 6, [60])
    assert written == [row[:length] for row, length in zip(whole, lengths.tolist(), strict=True)]


def test_beams_of_an_encoder_decoder_begin_and_end_as_they_should(taught_t5, t5_tokenizer):
    model, prompts = taught_t5().eval(), encode_prompts(t5_tokenizer, ["say north", "say east", "say west"], True)
    found = generate(model, t5_tokenizer, prompts, Decoding(8, num_beams=3), 2)
    assert all(ids[-1] == t5_tokenizer.eos_token_id and t5_tokenizer.bos_token_id not in ids for ids in found)
    places = [t5_tokenizer.decode(ids, skip_special_tokens=True).split()[0] for ids in found]
    assert places == ["north", "east", "west"]  # as taught
    assert places == [
        t5_tokenizer.decode(ids, skip_special_tokens=True).split()[0]
        for ids in generate(model, t5_tokenizer, prompts, Decoding(8), 2)
    ]


def test_a_cache_grows_and_rows_take_gaps(monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 2)
    states = torch.arange(4 * 3.0).view(4, 1, 3, 1)
    layer, expected = PreallocatedCacheLayer(states.clone(), -states), states
    for token in range(5):
        new = torch.full((len(expected), 1, 1, 1), 100.0 + token)
        expected = torch.cat([expected, new], 2)
        keys, values = layer.update(new, -new)
        assert torch.equal(keys, expected) and torch.equal(values, -expected)
        if token == 2:
            layer.move_rows(torch.tensor([3]), torch.tensor([1]), 3)
            expected = expected[[0, 3, 2]]
    assert layer.get_seq_length() == 8


def test_a_token_is_where_the_cumulative_probability_passes_the_draw():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(6, 1)
    draws = torch.tensor([0.0, 0.09, 0.11, 0.31, 0.59, 0.99])
    assert sample_tokens(logits, Decoding(1, 1.0), draws).tolist() == [0, 0, 1, 2, 2, 3]
    # At temperature 0.5 the weights are 1, 4, 9, 16 of 30.
    assert sample_tokens(logits, Decoding(1, 0.5), draws).tolist() == [0, 1, 1, 2, 3, 3]
    # The two likeliest, likeliest first: 4/7 and 3/7.
    assert sample_tokens(logits, Decoding(1, 1.0, top_k=2), draws).tolist() == [3, 3, 3, 3, 2, 2]
    # 0.4 does not reach 0.6, with 0.3 it does.
    assert sample_tokens(logits, Decoding(1, 1.0, top_p=0.6), draws).tolist() == [3, 3, 3, 3, 2, 2]
    assert sample_tokens(logits, Decoding(1, 1.0, top_p=0.39), draws).tolist() == [3] * 6
    # First the two likeliest, then of 4/7 and 3/7 those that reach 0.5.
    assert sample_tokens(logits, Decoding(1, 1.0, top_k=2, top_p=0.5), draws).tolist() == [3] * 6


def test_no_draw_reaches_a_token_of_probability_0():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    draws = torch.tensor([0.0, 1 - 2**-24])
    assert sample_tokens(logits, Decoding(1, 1.0), draws).tolist() == [1, 2]


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 5])
def test_a_draw_at_either_end_finds_the_outermost_weight(size):
    weights = torch.zeros(2, size)
    weights[:, [size // 3, size - 1 - size // 3]] = 0.1  # whose sum in float32 is not exact
    draws = torch.tensor([0.0, 1 - 2**-24])
    assert invert_cumulative(weights, draws).tolist() == [size // 3, size - 1 - size // 3]


def test_small_probabilities_of_a_large_vocabulary_count():
    """One token of 1/2, and 100,000 others of the same small probability, which float32 sums would lose."""
    weights = torch.full((3, 100_001), 5e-6)
    weights[:, 0] = 0.5
    found = invert_cumulative(weights, torch.tensor([0.4999, 0.75, 0.9999]))
    assert found.tolist() == pytest.approx([0, 50_000, 99_980], abs=2)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_probabilities_that_are_not_finite_give_no_token(options):
    logits = torch.tensor([[0.0, torch.nan, 0.0], [0.0, 40.0, 0.0]])
    assert sample_tokens(logits, Decoding(1, 1.0, **options), torch.tensor([0.5, 0.5])).tolist() == [-1, 1]


def test_nan_is_named(taught, tokenizer):
    model, prompts = taught().eval(), encode_prompts(tokenizer, TEXTS)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, tokenizer, prompts, Decoding(4, 1.0, repetition_penalty=1.1, stop_strings=("x",)), 8)


def test_frequencies_are_the_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(50)
    found = sample_tokens(logits.expand(40_000, 50), Decoding(1, 1.0), torch.rand(40_000)).bincount(minlength=50)
    torch.testing.assert_close(found / 40_000, logits.softmax(0), rtol=0, atol=0.006)  # about five standard errors


def test_a_row_is_sampled_alike_in_any_company(taught, tokenizer):
    model, prompts = taught().eval(), encode_prompts(tokenizer, [*TEXTS, TEXTS[1]])
    sampled = Decoding(max_new_tokens=8, temperature=1.0)
    found = []
    for size in (1, 2, 4):
        torch.manual_seed(1)
        found.append(generate(model, tokenizer, prompts, sampled, size))
    assert found[0] == found[1] == found[2]
    assert found[0][1] != found[0][-1]  # equal prompts have draws of their own


def test_no_end_before_the_shortest_length_and_none_but_the_end_is_changed(taught, tokenizer):
    model, prompts = taught().eval(), encode_prompts(tokenizer, TEXTS)
    end, free = tokenizer.eos_token_id, generate(model, tokenizer, prompts, Decoding(8), 8)
    shortest = max(map(len, free))
    assert min(map(len, free)) < 7 and shortest < 8
    for minimum in (shortest, 8):
        longer = generate(model, tokenizer, prompts, Decoding(8, min_new_tokens=minimum), 8)
        assert all(len(ids) >= minimum and end not in ids[:minimum] for ids in longer)
        assert all(ids[: len(row) - 1] == row[:-1] for ids, row in zip(longer, free, strict=True))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_text_ends_with_the_token_that_completes_a_stop_string(taught, tokenizer, beams):
    model, prompts = taught().eval(), encode_prompts(tokenizer, TEXTS)
    free = generate(model, tokenizer, prompts, Decoding(8, num_beams=beams), 8)
    text = tokenizer.decode(free[0], skip_special_tokens=True)
    word = text.split()[1][:3]
    found = generate(model, tokenizer, prompts, Decoding(8, num_beams=beams, stop_strings=(word, "nowhere")), 8)
    assert len(found[0]) < len(free[0]) and found[0] == free[0][: len(found[0])]
    assert word in tokenizer.decode(found[0]) and word not in tokenizer.decode(found[0][:-1])
    later = Decoding(8, num_beams=beams, stop_strings=(word,), min_new_tokens=len(found[0]) + 1)
    assert len(generate(model, tokenizer, prompts, later, 8)[0]) == len(found[0]) + 1
