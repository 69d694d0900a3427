"""The shared model against transformers' own forward pass, for several architectures."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.models.dropout import remove_dropout
from pipeline.models.kernels import lm_head as head
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.states import check_trunk_and_head

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12]]
COMPLETIONS = [[13, 14], [15, 16, 17, 18, 2], [19]]
SIZES = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,  # as OPT-350m: the LM head is narrower than the trunk
}
# Models that scale or cap their logits, each so strongly that leaving it out would be seen.
GRANITE = {"embedding_multiplier": 6.0, "logits_scaling": 0.2, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
GEMMA2 = {"head_dim": 16, "final_logit_softcapping": 0.7, "attn_logit_softcapping": 0.1, "query_pre_attn_scalar": 16}
HEADS = {
    "cohere": {**COMMON, "logit_scale": 2.5},
    "cohere2": {**COMMON, "head_dim": 16, "logit_scale": 2.5, "sliding_window": 4},
    "granite": {**COMMON, **GRANITE},
    "gemma2": {**COMMON, **GEMMA2, "sliding_window": 4, "initializer_range": 0.1},
    "gemma3_text": {**COMMON, "head_dim": 16, "sliding_window": 4, "final_logit_softcapping": 0.7},
}
MODELS = {"llama": COMMON, "qwen2": COMMON, "gpt2": GPT2, "opt": OPT, "starcoder2": COMMON, **HEADS}


def build(architecture: str, **options) -> PreTrainedModel:
    """A random model of the given type, without dropout unless `options` ask for it."""
    config = AutoConfig.for_model(architecture, **SIZES, **MODELS.get(architecture, COMMON))
    for name in config.to_dict():
        if "drop" in name:
            setattr(config, name, 0.0)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1)


def move(model: SharedModel) -> None:
    """Change everything that is trained, as an update would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def batch(prompts=None, completions=None) -> Sequences:
    return make_sequences(prompts or PROMPTS, completions or COMPLETIONS, 0)


def own_logprobs(model, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of each completion by the model's own full forward pass, one example at a time, without padding."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
        logprobs = torch.log_softmax(logits / temperature, -1)[len(prompt) - 1 : -1]
        rows.append(logprobs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1))
    return rows


def assert_rows(found: Tensor, expected: list[Tensor]) -> None:
    """Each row starts with the expected numbers, with 0 behind them."""
    for row, numbers in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(numbers)], numbers, rtol=0, atol=2e-6)
        assert not row[len(numbers) :].any()


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_logprobs_are_those_of_transformers(architecture, full):
    plain = build(architecture)
    model = SharedModel(copy.deepcopy(plain), None if full else lora(), temperature=0.7)
    sequences = batch()
    with torch.no_grad():
        before = own_logprobs(plain, 0.7)
        outputs = model(sequences)
        assert_rows(outputs.logprobs, before)
        assert torch.equal(outputs.logprobs, model.reference_logprobs(sequences)[0])  # KL is exactly 0 at the start
        assert not outputs.values.any()
        move(model)
        outputs = model(sequences)
        assert_rows(outputs.logprobs, own_logprobs(model.network, 0.7))
        assert_rows(model.reference_logprobs(sequences)[0], before)  # the reference stays the SFT model
    assert (outputs.logprobs - model.reference_logprobs(sequences)[0]).abs().max() > 1e-3
    assert outputs.values[sequences.completion_mask].all()
    assert not outputs.values[~sequences.completion_mask].any()


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_gradients_are_those_of_transformers(architecture, full):
    model = SharedModel(build(architecture), None if full else lora(), temperature=0.7)
    move(model)
    weights = torch.linspace(-1, 1, 15).view(3, 5)
    gradients = []
    for logprobs in (model(batch()).logprobs, own_logprobs(model.network, 0.7)):
        model.zero_grad()
        rows = zip(logprobs, weights, map(len, COMPLETIONS), strict=True)
        sum((row[:length] * weight[:length]).sum() for row, weight, length in rows).backward()
        gradients.append({n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None})
    assert any(gradient.abs().max() > 1e-2 for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_what_is_done_to_logits_by_hand():
    logits, offset = torch.tensor([[1.0, -2.0]]), torch.tensor([1.0, 0.0])
    transform = head.LogitTransform(offset, 0.5, 2.0)
    found = transform(logits)  # 2 tanh(1 / 2) and 2 tanh(-1 / 2), whose slopes are 0.5 (1 - tanh(1 / 2) ** 2)
    torch.testing.assert_close(found, torch.tensor([[0.9242343, -0.9242343]]))
    torch.testing.assert_close(transform.slope(found), torch.tensor([[0.3932239, 0.3932239]]))
    assert torch.equal(logits, torch.tensor([[1.0, -2.0]]))
    assert head.LogitTransform(multiplier=0.5).slope(found) == 0.5


@pytest.mark.parametrize("cap", [None, 0.8])
def test_the_gradient_through_a_frozen_head_is_that_of_numbers(cap):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 6, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    transform = head.LogitTransform(torch.randn(6, dtype=torch.float64), 1.7, cap)

    def logprobs(states: Tensor) -> Tensor:
        return head.token_logprobs(layer, states, torch.tensor([0, 5, 2]), 6, 0.7, False, transform)[0]

    assert torch.autograd.gradcheck(logprobs, hidden)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_as_a_model_is_exactly_the_sft_model(full):
    plain = build("llama")
    model = SharedModel(copy.deepcopy(plain), None if full else lora())
    move(model)
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad():
        with model.reference() as reference:
            assert torch.equal(reference(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert not torch.equal(model.language_model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_entropy_by_direct_computation():
    plain = build("llama", initializer_range=0.5)
    outputs = SharedModel(copy.deepcopy(plain), lora(), temperature=2.0)(batch())
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([PROMPTS[0] + COMPLETIONS[0]])).logits[0, 3:-1] / 2.0
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(outputs.entropies[0, :2], expected)
    assert not outputs.entropies[0, 2:].any()


@pytest.mark.parametrize("architecture", MODELS)
def test_padding_changes_nothing(architecture):
    model = SharedModel(build(architecture), lora())
    move(model)
    with torch.no_grad():
        together = model(batch())
        # A fourth row makes every prompt and completion wider than before.
        wider = model(batch([*PROMPTS, [20] * 9], [*COMPLETIONS, [21] * 8]))
    for name in ("logprobs", "entropies", "values"):
        found, expected = getattr(wider, name), getattr(together, name)
        torch.testing.assert_close(found[:3, : expected.shape[1]], expected, rtol=0, atol=2e-6)
        assert not found[:3, expected.shape[1] :].any()


def test_pad_ids_are_never_read():
    model = SharedModel(build("llama"), lora())
    move(model)
    with torch.no_grad():
        first = model(make_sequences(PROMPTS, COMPLETIONS, pad_id=0))
        second = model(make_sequences(PROMPTS, COMPLETIONS, pad_id=2))
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.values, second.values)


def gradients(model: SharedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of log-probs and values, and the gradient of everything that is trained."""
    model.zero_grad()
    outputs = model(batch())
    weights = torch.linspace(-1, 1, outputs.logprobs.numel()).view_as(outputs.logprobs)
    loss = (outputs.logprobs * weights + outputs.values.square()).sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """Fills with the tokens whose logits exist at once."""
    pieces, original = [], head._log_softmax
    monkeypatch.setattr(
        head, "_log_softmax", lambda logits, *rest: pieces.append(len(logits)) or original(logits, *rest)
    )
    return pieces


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_chunked_logprobs_and_their_gradients_are_those_of_one_piece(monkeypatch, scored, full):
    model = SharedModel(build("llama"), None if full else lora())
    move(model)
    loss, whole = gradients(model)
    assert scored == [8]
    scored.clear()
    monkeypatch.setattr(head, "LOGIT_BUDGET", 3 * 300)
    chunked_loss, chunked = gradients(model)
    # Eight tokens, three at a time. Where the head is trained, once more in the backward pass.
    assert scored[:3] == [3, 3, 2] and len(scored) == (6 if full else 3)
    torch.testing.assert_close(chunked_loss, loss)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    assert all(gradient.any() for gradient in chunked.values())


@pytest.mark.parametrize(
    ("full", "cached", "thinnest", "pieces"),
    [(False, 5 * 300, 2, [4, 4]), (False, 1, 3, [3, 3, 2]), (True, 5 * 300, 2, [8])],
    ids=["a multiple of the thinnest", "at least the thinnest", "a trained head in one"],
)
def test_on_a_cpu_the_logits_of_a_frozen_head_are_as_many_as_its_caches_hold(
    monkeypatch, scored, full, cached, thinnest, pieces
):
    model = SharedModel(build("llama"), None if full else lora())
    monkeypatch.setattr(head, "CACHED_LOGITS", cached)
    monkeypatch.setattr(head, "THINNEST", thinnest)
    model(batch())
    assert scored == pieces


def test_the_weight_of_a_frozen_head_is_cast_once_and_not_once_a_piece(monkeypatch):
    """To the same bits as where autocast does it for each piece."""
    model = SharedModel(build("llama"), lora())
    monkeypatch.setattr(head, "LOGIT_BUDGET", 3 * 300)
    shape, casts = model.language_model.get_output_embeddings().weight.shape, []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == shape:
                casts.append(1)
            return function(*args, **kwargs or {})

    results = []
    for cast in (head._as_multiplied, lambda tensor: tensor):
        monkeypatch.setattr(head, "_as_multiplied", cast)
        casts.clear()
        with Casts(), torch.autocast("cpu", dtype=torch.bfloat16):
            results.append((gradients(model), len(casts)))
    (first, once), (second, each) = results
    assert once == 1 and each > 3
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_pieces_of_logits_fit_the_device(monkeypatch):
    class Properties:
        total_memory = 64 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    devices = [torch.device(kind) for kind in ("cpu", "cuda", "xpu")]
    head._accelerator_budget.cache_clear()
    assert [head._budget(device) for device in devices] == [2**24, 2**28, 2**26]
    head._accelerator_budget.cache_clear()
    assert [head._piece_rows(2**16, device) for device in devices] == [128, 2**12, 2**10]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_gradient_checkpointing_changes_nothing(full):
    model = SharedModel(build("llama"), None if full else lora())
    move(model)
    model.train()
    loss, plain = gradients(model)
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.language_model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    checkpointed_loss, checkpointed = gradients(model)
    assert len(calls) == 2  # forward, and once more on the way back
    assert torch.equal(checkpointed_loss, loss)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-7)


def test_trained_are_the_adapter_and_the_head_alone():
    plain = build("llama")
    total = sum(p.numel() for p in plain.parameters())
    model = SharedModel(plain, lora())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"value_head.weight", "value_head.bias"}
    assert trained == set(model.trainable_state())
    # r * (inputs + outputs) for 4 attention and 3 feed-forward matrices of 2 layers, and 32 + 1 for the head
    adapter = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter + 33
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == total


def test_full_fine_tuning_trains_everything_and_keeps_a_frozen_copy():
    model = SharedModel(build("llama"), None)
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("frozen_copy."))
    assert not any(name.startswith("frozen_copy.") for name in model.trainable_state())
    sequences = batch()
    before = model.reference_logprobs(sequences)[0]
    move(model)
    assert torch.equal(model.reference_logprobs(sequences)[0], before)
    assert not torch.equal(model(sequences).logprobs, before)
    model.to(torch.float64)
    with model.reference() as reference:
        assert reference.dtype == torch.float64  # the copy moves along


def test_trainable_state_round_trip():
    first, second = SharedModel(build("llama"), lora()), SharedModel(build("llama"), lora())
    move(first)
    second.load_trainable_state(first.trainable_state())
    assert torch.equal(first(batch()).logprobs, second(batch()).logprobs)
    assert torch.equal(first(batch()).values, second(batch()).values)
    incomplete = {name: tensor for name, tensor in first.trainable_state().items() if name != "value_head.bias"}
    with pytest.raises(ValueError, match=r"value_head\.bias"):
        second.load_trainable_state(incomplete)


DROPOUTS = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5},
    "llama": {"attention_dropout": 0.1},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("architecture", DROPOUTS)
def test_dropout_is_silenced(architecture):
    noisy, silent = build(architecture, **DROPOUTS[architecture]), build(architecture, **DROPOUTS[architecture])
    remove_dropout(silent)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        expected = silent(input_ids=ids).logits
        noisy.train(), silent.train()
        assert not torch.equal(noisy(input_ids=ids).logits, noisy(input_ids=ids).logits)
        assert torch.equal(silent(input_ids=ids).logits, expected)
        assert torch.equal(silent(input_ids=ids).logits, expected)


def test_the_shared_model_has_no_dropout_not_even_the_adapters():
    model = SharedModel(build("gpt2", **DROPOUTS["gpt2"]), lora())
    move(model)
    outputs = [model.train(mode)(batch()).logprobs for mode in (True, True, False)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("architecture", MODELS)
def test_trunk_and_head_of_plain_models_are_accepted(architecture):
    check_trunk_and_head(build(architecture))


def test_a_model_with_dropout_in_training_mode_is_accepted():
    model = build("gpt2", **DROPOUTS["gpt2"]).train()
    check_trunk_and_head(model)
    assert model.training


def test_a_model_that_does_more_to_its_states_is_refused_by_name():
    model = build("minicpm3", hidden_size=32, dim_model_base=4)
    with pytest.raises(ValueError, match="model: 'minicpm3' changes its states before or its logits after"):
        check_trunk_and_head(model)
