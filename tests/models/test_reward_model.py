"""The reward model by itself, on the base that PPO shares, and against plain forward passes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.models.reward_model import (
    RECORD_FILE,
    RewardNetwork,
    RewardRecord,
    check_base,
    final_states,
    load_record,
    tokenizer_digest,
    weights_digest,
)
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.shared_files import save_shared

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12]]
COMPLETIONS = [[13, 14, 2], [15, 16, 17, 18, 2], [19]]
RECORD = RewardRecord("adapter", "base", 0.5, 2.0, 0.7, 100)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 300}  # fmt: skip
CAUSAL = {"llama": SIZES, "gpt_neox": SIZES, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300}}
KINDS = {**CAUSAL, "t5": {**T5, "decoder_start_token_id": 0}, "bart": {**BART, "decoder_start_token_id": 2}}


def build(kind: str = "llama"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config).eval()


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def moved(network: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def sequences():
    return make_sequences(PROMPTS, COMPLETIONS, pad_id=2)  # pad equals EOS: positions come from masks


def saved(directory: Path, kind: str = "llama", **options) -> RewardNetwork:
    network = moved(RewardNetwork.create(build(kind), lora(**options)))
    network.save_pretrained(directory)
    return network.eval()


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_state_has_read_the_last_token_and_no_padding(kind):
    model = build(kind)
    states = final_states(model, sequences())
    for row, ids in enumerate(p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)):
        alone = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(states[row], alone)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_decoders_state_has_read_the_last_token_and_no_padding(kind):
    model = build(kind)
    start = model.config.decoder_start_token_id
    states = final_states(model, sequences())
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *completion]])}
        alone = model(**ids, output_hidden_states=True).decoder_hidden_states[-1][0, -1]
        torch.testing.assert_close(states[row], alone)


def test_eos_is_read_where_there_is_one():
    network = moved(RewardNetwork.create(build(), lora())).eval()
    scores = [network.scores(make_sequences([[5, 6]], [ids], 0)) for ids in ([7, 8], [7, 8, 2])]
    assert abs(float(scores[0] - scores[1])) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["adapter", "value adapter", "full"])
def test_ppo_scores_on_the_shared_base_what_the_reward_model_said(tmp_path, kind, policy):
    expected = saved(tmp_path, kind).scores(sequences())
    shared = SharedModel(build(kind), None if policy == "full" else lora(), value_adapter=policy == "value adapter")
    before = shared(sequences())
    parameters, trained = sum(1 for _ in shared.network.parameters()), set(shared.trainable_state())
    shared.add_reward(tmp_path)
    for _ in range(2):  # again after an update of the policy, which is no part of the reward
        torch.testing.assert_close(shared.reward_scores(sequences()), expected)
        assert set(shared.trainable_state()) == trained
        moved(shared, 2)
    # and the policy is not changed by it, nor what is trained and saved
    fresh = SharedModel(build(kind), None if policy == "full" else lora(), value_adapter=policy == "value adapter")
    fresh.load_trainable_state(shared.trainable_state())
    torch.testing.assert_close(shared(sequences()).logprobs, fresh(sequences()).logprobs)
    torch.testing.assert_close(shared.reference_logprobs(sequences())[0], before.logprobs)
    if policy == "full":
        assert (
            sum(1 for _ in shared.network.parameters()) == parameters
        )  # the copy that is the reference anyway carries it
    save_shared(shared, tmp_path / "policy")
    assert not (tmp_path / "policy" / "reward").exists()
    shared(sequences()).logprobs.sum().backward()
    grads = [p.grad is not None for n, p in shared.named_parameters() if ".reward." in n]
    assert not any(grads)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"r": 2, "lora_alpha": 3}]
)
def test_a_reward_adapter_of_another_shape_than_the_policys(tmp_path, options):
    expected = saved(tmp_path, **options).scores(sequences())
    for policy in (lora(), lora(target_modules=["q_proj", "v_proj"])):
        shared = SharedModel(build(), policy)
        logprobs = shared(sequences()).logprobs
        shared.add_reward(tmp_path)
        torch.testing.assert_close(shared.reward_scores(sequences()), expected)
        torch.testing.assert_close(shared(sequences()).logprobs, logprobs)


def test_what_is_saved_is_an_adapter_and_a_head_and_loads_back(tmp_path):
    network = saved(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 0.5 * sum(p.numel() * 4 for p in build().parameters())
    loaded = RewardNetwork.load(build(), tmp_path).eval()
    torch.testing.assert_close(loaded.scores(sequences()), network.scores(sequences()))


def test_a_record_is_read_back_and_a_missing_one_named(tmp_path):
    RECORD.save(tmp_path)
    assert load_record(tmp_path) == RECORD
    (tmp_path / RECORD_FILE).write_text(json.dumps({"kind": "adapter"}))
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"reward_model_path: .* holds no finished reward model"):
            load_record(place)


def test_another_base_or_tokenizer_is_refused_naming_both(tokenizer):
    model = build()
    record = replace(
        RECORD, path="runs/a/sft", base_digest=weights_digest(model), tokenizer_digest=tokenizer_digest(tokenizer)
    )
    check_base(record, build().to(torch.bfloat16), tokenizer, "runs/b/sft")  # the precision is no other base
    with pytest.raises(ValueError, match=r"over the model of 'runs/a/sft', .* starts from 'runs/b/sft', whose model"):
        check_base(record, moved(build(), 3), tokenizer, "runs/b/sft")
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"over the tokenizer of 'runs/a/sft'.* whose tokenizer is another"):
        check_base(record, model, other, "runs/b/sft")
