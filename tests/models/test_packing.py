"""Padding-free passes against padded ones, and where they are not possible."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.models.kernels import packing
from pipeline.models.kernels.packing import PREFIX, pack
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.shared_files import save_shared
from tests.models.test_shared import COMMON, HEADS, SIZES, lora, move

# Two prompts twice, apart from each other; completions of one token, which have no column of their own to read.
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [13], [8, 9, 10, 11, 12]]
COMPLETIONS = [[14, 15, 16, 17], [18], [19, 20, 21], [22, 2], [23, 24, 25, 26, 27, 2]]
MODELS = {
    "llama": {**COMMON, "num_attention_heads": 4},
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "gemma": {**COMMON, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.1},
    "gpt_neox": COMMON,
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mistral": {**COMMON, "sliding_window": None},
    **HEADS,
}
WINDOW = {"sliding_window": 32}  # longer than the texts
EAGER = {"gemma2"}  # its attention caps its scores, which sdpa cannot


def build(architecture: str, implementation: str, **options) -> PreTrainedModel:
    sizes = MODELS.get(architecture, COMMON)
    config = AutoConfig.for_model(architecture, **{**SIZES, **sizes, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def batch() -> Sequences:
    return make_sequences(PROMPTS, COMPLETIONS, 0)


def outcome(model: PreTrainedModel, full: bool, padding_free: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, values and all gradients of a moved policy."""
    torch.manual_seed(1)  # of the adapter
    shared = SharedModel(model, None if full else lora(), padding_free=padding_free)
    assert shared.padding_free == padding_free
    move(shared)
    outputs = shared.train()(batch())
    (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
    gradients = [p.grad for p in shared.parameters() if p.grad is not None]
    return outputs.logprobs.detach(), outputs.values.detach(), gradients


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("implementation", packing.IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", MODELS)
def test_packed_is_padded_without_padding(architecture, implementation, full):
    if architecture in EAGER and implementation != "eager":
        pytest.skip("transformers refuses it")
    model = build(architecture, implementation, **(WINDOW if "sliding_window" in MODELS[architecture] else {}))
    packed = outcome(copy.deepcopy(model), full, True)
    padded = outcome(copy.deepcopy(model), full, False)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)
    assert packed[2] and all(gradient.any() for gradient in packed[2][1:])


def test_prompts_are_read_once_and_padding_never():
    row = pack(batch())
    assert sorted(row.ids.tolist()) == sorted([5, 6, 7, *range(8, 13), 13, 14, 15, 16, 19, 20, 22, *range(23, 28)])
    assert row.num_prompt_tokens == 9 and len(row.states_at) == sum(map(len, COMPLETIONS))
    start, prompt = row.states_at[0], row.ids[: row.num_prompt_tokens].tolist()
    assert prompt[start] == 7 and row.states_at[5] == start  # both answers to the first prompt start from its end
    at = {int(token): int(position) for token, position in zip(row.ids, row.positions, strict=True)}
    assert (at[5], at[7], at[14], at[19], at[12], at[23], at[13], at[22]) == (0, 2, 3, 3, 4, 5, 0, 1)


def test_a_padding_token_that_is_a_word_is_read():
    same_ids = make_sequences([[0, 5], [5]], [[6], [6]], 0)  # the second is padded with what the first starts with
    assert pack(same_ids).num_prompt_tokens == 3


def test_equal_prompts_share_a_micro_batch():
    prompts = [[4, 4], [5], [4, 4], [5], [4, 4], [5]]
    completions = [[6], [7, 7, 7], [6, 6, 6, 6, 6], [7], [6], [7, 7]]
    chunks = [chunk.tolist() for chunk in make_sequences(prompts, completions, 0).chunks(3)]
    assert chunks == [[1, 3, 5], [0, 2, 4]]


@pytest.mark.parametrize("architecture", ["mistral", "cohere2", "gemma2", "gemma3_text"])
def test_rows_beyond_the_window_are_padded(architecture):
    model = build(architecture, "eager", sliding_window=4)
    packed = outcome(copy.deepcopy(model), False, True)
    torch.testing.assert_close(packed, outcome(copy.deepcopy(model), False, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}), ("bloom", {})],
)
def test_models_without_exchangeable_attention_are_padded(architecture, options):
    shared = SharedModel(build(architecture, "eager", **options), lora())
    assert not shared.padding_free and not shared.language_model.config._attn_implementation.startswith(PREFIX)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_model_that_does_more_between_tokens_is_found_out(monkeypatch, full):
    monkeypatch.setattr(packing, "_rows", lambda x, at, mask: torch.zeros(*mask.shape, *x.shape[1:]))
    shared = SharedModel(build("llama", "sdpa"), None if full else lora())
    assert not shared.padding_free
    for model in filter(None, (shared.language_model, shared.frozen_copy)):
        assert model.config._attn_implementation == "sdpa"


def test_a_difference_in_longer_texts_alone_is_found_out(monkeypatch):
    original = packing._rows

    def rows(x, at, mask):
        return original(x, at, mask) * (mask.shape[1] <= 4)

    monkeypatch.setattr(packing, "_rows", rows)
    assert not SharedModel(build("llama", "sdpa"), lora()).padding_free


def test_the_saved_model_keeps_its_own_attention(tmp_path):
    shared = SharedModel(build("llama", "eager"), None)
    save_shared(shared, tmp_path)
    assert PREFIX not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_batch_is_packed_once(monkeypatch):
    model, sequences = build("llama", "eager"), batch()
    shared, packed, original = SharedModel(model, lora()), [], packing._pack
    monkeypatch.setattr(packing, "_pack", lambda rows, multiple: packed.append(rows) or original(rows, multiple))
    first = [shared(rows).logprobs for _, rows in sequences.batches(2)]
    again = [shared(rows).logprobs for _, rows in sequences.batches(2)]
    shared.reference_logprobs(*(rows for _, rows in sequences.batches(2)))
    assert len(packed) == len(first) > 1
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    kept = [made.masks for _, rows in sequences.batches(2) for made in rows.made.values()]
    assert kept and not any(kept)  # masks grow with the square of the length
    assert [len(rows) for _, rows in sequences.batches(len(sequences))] == [len(sequences)]
    assert len(sequences.made) == 1  # rows of another size are not kept


def test_tokens_that_fill_a_row_up_change_nothing():
    model, sequences = build("llama", "eager"), batch()
    SharedModel(model, lora())  # gives the model's attention its packed way
    exact, filled = pack(sequences), pack(sequences, 32)
    assert len(exact.ids) == 20 and len(filled.ids) == 32
    assert torch.equal(filled.ids[:20], exact.ids) and torch.equal(filled.states_at, exact.states_at)
    states = [packing.packed_states(model, row) for row in (exact, filled)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


def test_in_bfloat16_on_a_cpu_rows_are_filled_up(monkeypatch):
    shared, rows = SharedModel(build("llama", "eager"), lora()), []
    original = packing.packed_states
    monkeypatch.setattr("pipeline.models.shared.packed_states", lambda m, row: rows.append(row) or original(m, row))
    with torch.autocast("cpu", torch.bfloat16):
        shared(batch())
    shared(batch())
    assert [len(row.ids) for row in rows] == [32, 20]
