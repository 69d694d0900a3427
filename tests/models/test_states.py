"""States and logits of encoder-decoders against their own forward pass, and how often their encoder runs."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pipeline.models.adapters import adapter_config
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.states import (
    check_causal,
    check_repeatable,
    check_trunk_and_head,
    completion_states,
    encode,
    final_states,
    lm_head,
)

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12], [9]]
COMPLETIONS = [[13, 14], [15, 16, 17, 18, 2], [19], [20, 21]]
SIZES = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
FAMILIES = {
    "t5": T5,  # scales the decoder's output before its head
    "mt5": T5,  # does not
    "umt5": T5,
    "bart": BART,  # adds a bias to the logits
    "mbart": BART,
    "marian": BART,
    "pegasus": BART,
    "m2m_100": BART,
}


def build(kind: str, forced: int | None = 7) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **SIZES, **FAMILIES[kind])).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() > 1 and "embed_positions" not in name:
            torch.nn.init.normal_(tensor, std=0.3)
    model.generation_config.forced_bos_token_id = forced
    return model


def batch() -> Sequences:
    return make_sequences(PROMPTS, COMPLETIONS, 0)


def lora(targets="all-linear") -> LoraConfig:
    return LoraConfig(r=2, target_modules=targets)


def move(model: SharedModel) -> None:
    """Change everything that is trained, as an update would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def count_encoder_rows(model: PreTrainedModel) -> list[int]:
    """Filled with the number of prompts of each pass through the encoder."""
    rows: list[int] = []
    model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


@torch.no_grad()
def own_logits(model: PreTrainedModel, row: int) -> Tensor:
    """[C, V] by the model's own forward pass over one example, without padding."""
    read = [*decoder_prefix(model), *COMPLETIONS[row][:-1]]
    output = model(input_ids=torch.tensor([PROMPTS[row]]), decoder_input_ids=torch.tensor([read]))
    return output.logits[0, len(decoder_prefix(model)) - 1 :]


def test_an_encoder_reads_from_the_left():
    ids, mask = batch().encoder_inputs()
    assert ids.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 12, 0], [9, 0, 0, 0]]
    assert mask.sum(1).tolist() == [4, 1, 3, 1] and mask[:, 0].all()
    kept = Sequences(*list(vars(batch()).values())[:4], encoder_states=torch.arange(16.0).view(4, 4, 1))
    part = kept.rows(torch.tensor([2, 1]))
    assert part.encoder_states.squeeze(-1).tolist() == [[8, 9, 10], [4, 5, 6]]
    assert part.encoder_inputs()[0].tolist() == [[10, 11, 12], [9, 0, 0]]


@pytest.mark.parametrize("forced", [None, 7])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_model(kind, forced):
    model = build(kind, forced)
    check_trunk_and_head(model)
    with torch.no_grad():
        found = lm_head(model)(completion_states(model, batch()))
    for row, completion in enumerate(COMPLETIONS):
        torch.testing.assert_close(found[row, : len(completion)], own_logits(model, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_logprobs_of_policy_and_reference(kind, full):
    plain = build(kind)
    model = SharedModel(copy.deepcopy(plain), None if full else lora(), temperature=0.7)
    with torch.no_grad():
        assert torch.equal(model(batch()).logprobs, model.reference_logprobs(batch())[0])
        move(model)
        logprobs, reference = model(batch()).logprobs, model.reference_logprobs(batch())[0]
    assert (logprobs - reference).abs().max() > 1e-3
    for found, network in ((logprobs, model.language_model), (reference, plain)):
        for row, completion in enumerate(COMPLETIONS):
            expected = torch.log_softmax(own_logits(network, row) / 0.7, -1)
            expected = expected.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(found[row, : len(completion)], expected, rtol=0, atol=2e-5)
            assert not found[row, len(completion) :].any()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_changes_nothing(kind):
    model = build(kind)
    wider = make_sequences([*PROMPTS, [20] * 9], [*COMPLETIONS, [21] * 8], 2)
    with torch.no_grad():
        found, expected = completion_states(model, wider), completion_states(model, batch())
    for row, completion in enumerate(COMPLETIONS):
        torch.testing.assert_close(found[row, : len(completion)], expected[row, : len(completion)])


def test_the_last_state_has_read_the_last_token():
    causal = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    for model in (causal, build("t5"), build("bart")):
        prefix = decoder_prefix(model)
        with torch.no_grad():
            found = final_states(model, batch())
            for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
                if prefix:
                    longer = make_sequences([prompt], [[*completion, 33]], 0)
                    expected = completion_states(model, longer)[0, len(completion)]
                else:
                    expected = model.transformer(torch.tensor([prompt + completion])).last_hidden_state[0, -1]
                torch.testing.assert_close(found[row], expected)


def test_equal_prompts_are_encoded_once_and_gradients_are_those_of_each():
    model = build("bart").double()
    rows = count_encoder_rows(model)
    states = encode(model, batch())
    assert rows == [3] and torch.equal(states[1], states[3])
    assert encode(model, batch(), size=2).allclose(states) and rows == [3, 2, 1]
    weights = torch.randn(states.shape, dtype=torch.float64)
    mask = batch().encoder_inputs()[1].unsqueeze(-1)
    gradients = []
    for apart in (False, True):
        model.zero_grad()
        parts = [Sequences(*(part[i : i + 1] for part in list(vars(batch()).values())[:4])) for i in range(4)]
        found = torch.cat([encode(model, part) for part in parts]) if apart else encode(model, batch())
        (found * weights * mask).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.get_encoder().named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_in_which_nothing_trains_runs_once_for_every_role_and_pass(kind):
    model = SharedModel(build(kind), lora("decoder-linear"), value_adapter=True)
    assert model.encoder_is_frozen
    assert (
        not SharedModel(build(kind), lora()).encoder_is_frozen and not SharedModel(build(kind), None).encoder_is_frozen
    )
    move(model)
    rows = count_encoder_rows(model.language_model)
    with torch.no_grad():
        expected, reference = model(batch()), model.reference_logprobs(batch())[0]
        assert rows == [3, 3, 3]
        rows.clear()
        kept = model.encoded(batch(), 8)
        found = model(kept)
        assert torch.equal(found.logprobs, expected.logprobs) and torch.equal(found.values, expected.values)
        assert torch.equal(model.reference_logprobs(kept)[0], reference)
    assert rows == [3]
    trained = SharedModel(build(kind), lora())
    assert trained.encoded(batch(), 8).encoder_states is None


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_decoder_linear_is_every_dense_layer_of_the_decoder(kind):
    model = build(kind)
    found = adapter_config(model, lora("decoder-linear"))
    # Two attentions of four matrices and a feed-forward layer of two, in two layers.
    assert len(found.target_modules) == 2 * (4 + 4 + 2) and all(".decoder." in f".{n}." for n in found.target_modules)
    assert found.task_type == "SEQ_2_SEQ_LM"
    shared = SharedModel(model, lora("decoder-linear"))
    adapted = {name.split(".lora_")[0] for name, _ in shared.network.named_parameters() if ".lora_" in name}
    assert len(adapted) == 20 and not any(".encoder." in name for name in adapted)


def test_decoder_linear_needs_a_decoder_of_its_own():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    with pytest.raises(ValueError, match="'decoder-linear' is for encoder-decoders, and this gpt2 has no encoder"):
        adapter_config(model, lora("decoder-linear"))
    assert adapter_config(model, lora()).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_gradient_checkpointing_changes_nothing(kind, full):
    model = SharedModel(build(kind), None if full else lora(), value_adapter=not full)
    move(model)
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(batch())
        (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.enable_gradient_checkpointing()
    layers = next(m for m in model.language_model.get_decoder().children() if isinstance(m, torch.nn.ModuleList))
    calls = []
    next(
        m for n, m in layers[0].named_modules() if n.endswith(("EncDecAttention", "encoder_attn"))
    ).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if full else 4)  # forward and again on the way back, for the value's adapter too
    assert any(gradient.any() for name, gradient in plain.items() if "encoder" in name)


@pytest.mark.parametrize("target", ["shared", "embed_tokens", "lm_head"])
def test_an_adapter_on_a_shared_embedding_is_refused(target):
    with pytest.raises(ValueError, match=rf"'{target}' of this t5 shares its weights"):
        SharedModel(build("t5"), lora(["q", target]))


def test_a_model_that_reads_both_ways_is_refused(taught, taught_t5):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for is_decoder in (False, True):
        config = AutoConfig.for_model("bert", vocab_size=20, is_decoder=is_decoder, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        if is_decoder:
            check_causal(model)
            continue
        with pytest.raises(ValueError, match="'bert' reads the whole text in both directions"):
            check_causal(model)
    for model in (taught().train(), taught_t5().train()):
        check_causal(model)
        assert model.training


def test_checks_need_no_kernel_of_a_gpu(taught):
    def refuse(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports CUDA")

    AttentionInterface.register("of_a_gpu", refuse)
    AttentionMaskInterface.register("of_a_gpu", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = taught()
    model.set_attn_implementation("of_a_gpu")
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        model(torch.tensor([[1, 2]]))
    check_causal(model)
    check_repeatable(model)
    check_trunk_and_head(model)
    assert model.config._attn_implementation == "of_a_gpu"
