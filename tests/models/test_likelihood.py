"""Log-probs, entropy and KL against the model's whole logits, and how much memory they take."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.models import likelihood
from pipeline.models.kernels import lm_head as head
from pipeline.models.likelihood import completion_logprobs, entropy_and_divergence
from pipeline.models.loading import lora_config
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.states import logits_are_of_head
from pipeline.trainers.ppo.rollout import compute_token_outputs

VOCABULARY = 1000
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
# Plain ones, one that caps its logits, and one that changes its states in a way that is not known here.
MODELS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 64},
    "minicpm3": {
        "dim_model_base": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def build(architecture: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of random weights, large enough that its logits are far from equal."""
    torch.manual_seed(seed)
    options = {**SIZES, **MODELS[architecture], "initializer_range": 0.2, **changes}
    config = AutoConfig.for_model(architecture, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def some_sequences(rows: int = 5, prompt: int = 6, completion: int = 7) -> Sequences:
    """Rows of which each is one token shorter than the one before, down to one token."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, prompt + completion), generator=chance).tolist()
    prompts = [row[: max(1, prompt - number)] for number, row in enumerate(ids)]
    completions = [row[prompt : max(prompt + 1, prompt + completion - number)] for number, row in enumerate(ids)]
    return make_sequences(prompts, completions, 0)


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, sequences: Sequences, row: int, temperature: float = 1.0) -> Tensor:
    """[C, V] of one row, by the model's own forward pass without padding."""
    prompt = sequences.prompt_ids[row][sequences.prompt_mask[row]]
    completion = sequences.completion_ids[row][sequences.completion_mask[row]]
    logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, -1)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("rows", [1, 4, 1000])  # of a piece
def test_figures_are_those_of_the_whole_logits(architecture, rows, monkeypatch):
    monkeypatch.setattr(head, "_piece_rows", lambda vocabulary, device: rows)
    model, other, sequences = build(architecture), build(architecture, seed=1), some_sequences()
    logprobs = completion_logprobs(model, sequences)
    entropies, divergences = entropy_and_divergence(model, sequences, 0.7, other)
    alone, nothing = entropy_and_divergence(model, sequences, 0.7)
    assert torch.equal(alone, entropies) and not nothing.any()
    for row in range(len(sequences)):
        count = int(sequences.completion_mask[row].sum())
        chosen = own_logprobs(model, sequences, row).gather(1, sequences.completion_ids[row, :count].unsqueeze(1))
        own, theirs = (own_logprobs(each, sequences, row, 0.7) for each in (model, other))
        expected = chosen.squeeze(1), -(own.exp() * own).sum(1), (own.exp() * (own - theirs)).sum(1)
        for found, wanted in zip((logprobs, entropies, divergences), expected, strict=True):
            assert found[row, :count].tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-4)
            assert not found[row, count:].any()
    assert float(divergences.max()) > 0.1
    assert logits_are_of_head(model) == (architecture != "minicpm3")  # both ways of reading are tested


class Memory(TorchDispatchMode):
    """What operations allocate: `peak`, the most bytes at once, and `largest`, the most rows of float32 `[.., V]`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A view of something that was there before, such as a weight, allocates nothing.
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
                if tensor.shape[-1:] == (VOCABULARY,) and tensor.dtype == torch.float32:
                    self.largest = max(self.largest, tensor.numel() // VOCABULARY)
        self._living = {key: living for key, living in self._living.items() if not living[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scoring_takes_no_more_memory_than_ppos(temperature, monkeypatch, model_config):
    """64 completions of 8 tokens: PPO's scoring, and that of the report."""
    monkeypatch.setattr(head, "THINNEST", 32)
    monkeypatch.setattr(head, "CACHED_LOGITS", 32 * VOCABULARY)
    sequences = make_sequences(*torch.randint(3, VOCABULARY, (2, 64, 8)).tolist(), 0)
    shared = SharedModel(build("llama"), lora_config(model_config), temperature)
    model, sft = build("llama", seed=1), build("llama")
    with Memory() as ppo:
        compute_token_outputs(shared, sequences, 64)
    with Memory() as references:
        completion_logprobs(model, sequences)
    with Memory() as samples:
        entropy_and_divergence(model, sequences, temperature, sft)
    assert ppo.largest == references.largest == samples.largest == 32  # of the 512 tokens
    assert references.peak <= ppo.peak and samples.peak <= 1.2 * ppo.peak
    assert samples.peak < 4 * 512 * VOCABULARY  # of one tensor of all logits


def test_memory_counts_what_lives_at_once():
    with Memory() as memory:
        first = torch.ones(3, VOCABULARY)
        second = first + 1
        del first
        third = second * 2
        del second, third
    assert (memory.peak, memory.largest) == (2 * 3 * VOCABULARY * 4, 3)


def test_half_a_precision_may_add_up_in_another_order():
    """One step of bfloat16 in one logit is no other model; logits of another scale are."""
    model = build("llama").to(torch.bfloat16)
    forward, calls = model.lm_head.forward, []

    def one_step_off(hidden: Tensor) -> Tensor:
        logits = forward(hidden)
        calls.append(logits.shape)
        if len(calls) == 1:
            logits[..., -1] = torch.nextafter(logits[..., -1], torch.full_like(logits[..., -1], torch.inf))
        return logits

    model.lm_head.forward = one_step_off
    assert logits_are_of_head(model) and len(calls) == 2
    calls.clear()
    model.lm_head.forward = lambda hidden: calls.append(1) or forward(hidden) * len(calls)
    assert not logits_are_of_head(model)


def test_how_logits_are_read_is_found_out_once(monkeypatch):
    model, asked = build("llama"), []
    monkeypatch.setattr(likelihood, "logits_are_of_head", lambda one: asked.append(one) or logits_are_of_head(one))
    for _ in range(2):
        completion_logprobs(model, make_sequences([[5, 6]], [[7, 8]], 0))
    assert asked == [model]
