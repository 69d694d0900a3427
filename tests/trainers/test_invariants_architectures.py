"""The same invariants for several architectures, causal and encoder-decoder, built tiny from their configurations."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from ppo_toys import training_steps, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.gemma2 import modeling_gemma2

from pipeline.models.loading import load_policy, lora_config
from pipeline.runtime.signals import Stopped
from pipeline.trainers.ppo.rollout import compute_token_outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler")
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**COMMON, "num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gemma": GROUPED,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "gpt_neox": {**COMMON, "hidden_dropout": 0.1, "attention_dropout": 0.1},
}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
ARCHITECTURES |= MIXTURES
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
CAPPED = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
# Models that scale or cap their logits; windows of 8 tokens, shorter than some rows and longer than others.
ARCHITECTURES |= {
    "cohere": {**GROUPED, "logit_scale": 0.5},
    "cohere2": {**GROUPED, "logit_scale": 0.5, "sliding_window": 8},
    "granite": {**GROUPED, **GRANITE},
    "gemma2": {**GROUPED, **CAPPED, "sliding_window": 8},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 8},
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
ENCODER_DECODERS = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "bart": BART,
    "mbart": {**BART, "decoder_layerdrop": 0.2},
    "marian": BART,
}
ARCHITECTURES |= ENCODER_DECODERS
TIED = {"gpt2", "qwen2", "gemma", "opt", "cohere", "cohere2", "gemma2", "gemma3_text", *ENCODER_DECODERS}
# Float64, but some norms compute in float32 inside, and constants such as Gemma's scale of embeddings were made in it.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


EIGHT_AT_ONCE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}


@pytest.fixture(autouse=True)
def finite_masks(monkeypatch):
    """The lowest float64 masks what is not read; in the float32 of Gemma 2's softmax it is -inf: NaN in padding."""
    attend, lowest = modeling_gemma2.eager_attention_forward, torch.finfo(torch.float32).min

    def eager_attention_forward(module, query, key, value, attention_mask, **options):
        mask = None if attention_mask is None else attention_mask.clamp(min=lowest)
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", eager_attention_forward)


def experts_option(architecture: str) -> dict[str, str]:
    """The faster ways to compute a mixture of experts know no float64."""
    return {"experts_implementation": "eager"} if architecture in MIXTURES else {}


def build(architecture: str) -> PreTrainedModel:
    """Random weights, large enough for probabilities to differ; encoder-decoders force a first token, number 5."""
    settings = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1}
    settings |= {"init_std": 0.1, "tie_word_embeddings": architecture in TIED, **ARCHITECTURES[architecture]}
    torch.manual_seed(0)
    if architecture not in ENCODER_DECODERS:
        config = AutoConfig.for_model(architecture, **settings)
        return AutoModelForCausalLM.from_config(config, **experts_option(architecture)).double()
    config = AutoConfig.for_model(architecture, **settings, decoder_start_token_id=1)
    model = AutoModelForSeq2SeqLM.from_config(config).double()
    model.generation_config.forced_bos_token_id = 5
    if architecture != "t5":
        torch.nn.init.normal_(model.final_logits_bias)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model finds likely after some tokens, and for an encoder-decoder some others before them."""
    ids = {"input_ids": torch.arange(3, 20).unsqueeze(0)}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.arange(30, 37).unsqueeze(0)
    with torch.no_grad():
        return model(**ids).logits


def even(prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
    """The share of even token ids: something random models differ in."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ratio_kl_and_merge(make_trainer, tmp_path, architecture, use_peft):
    model = build(architecture)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (architecture in TIED)
    sft = copy.deepcopy(model).eval()
    trainer = make_trainer(model=model, reward=even, use_peft=use_peft, total_episodes=16)
    trainer.train()
    first, second = training_steps(trainer.output_dir)
    assert first["objective/kl"] == 0.0 and first["val/ratio_first"] == second["val/ratio_first"] == 1.0
    assert second["objective/kl"] != 0.0 and first["val/ratio"] != 1.0
    trainer.save_model()
    if use_peft:
        merged = PeftModel.from_pretrained(copy.deepcopy(sft), trainer.output_dir).merge_and_unload()
    else:
        options = experts_option(architecture)
        merged = type(sft).from_pretrained(trainer.output_dir, dtype=torch.float64, **options).eval()
    expected = logits(trainer.shared.eval().language_model)
    assert (logits(sft) - expected).abs().max() > 1e-3
    # Buffers such as rotary frequencies are made in float32 and widened, or made in float64 by from_pretrained.
    tolerance = CLOSE if use_peft else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(merged), expected, **tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_micro_batches_and_padding(make_trainer, architecture):
    whole = make_trainer("whole", model=build(architecture), reward=even, **EIGHT_AT_ONCE)
    parts = make_trainer("parts", model=build(architecture), reward=even, **ONE_BY_ONE)  # without any padding
    rollout = whole.collect_rollout(whole.prompt_rows(0))
    assert rollout.sequences.prompt_mask.sum(1).unique().numel() > 1
    found, _ = compute_token_outputs(parts.shared, rollout.sequences, 1)
    for name in ("logprobs", "ref_logprobs", "values", "entropies"):
        torch.testing.assert_close(getattr(found, name), getattr(rollout, name), **CLOSE)
    experience, _ = whole.compute_advantages(rollout)
    before, stats, own = weights(whole), whole.update(experience), parts.update(experience)
    assert own == pytest.approx(stats, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), **CLOSE)
    assert not all(torch.equal(before[name], weight) for name, weight in weights(whole).items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stopped_run_ends_the_same_and_so_does_one_that_recomputes_layers(make_trainer, monkeypatch, architecture):
    def trainer(name: str, **settings):
        return make_trainer(name, model=build(architecture), reward=even, **settings)

    whole, saving = trainer("whole"), trainer("saving", gradient_checkpointing=True)
    whole.train(), saving.train()
    torch.testing.assert_close(weights(saving), weights(whole), **CLOSE)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.trainers.ppo.trainer.requested_stop", lambda: signal.SIGTERM)
        with pytest.raises(Stopped):
            trainer("broken").train()
    again = trainer("broken")
    again.train()
    assert all(torch.equal(found, weights(whole)[name]) for name, found in weights(again).items())
    assert training_steps(again.output_dir) == training_steps(whole.output_dir)


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
@pytest.mark.parametrize("value_model", ["head", "adapter"])
def test_a_frozen_encoder_reads_each_prompt_once_a_rollout_and_changes_no_weight(
    make_trainer, model_config, architecture, value_model
):
    """LoRA on the decoder: the states that are kept give what a pass for each epoch and role gives."""
    lora = lora_config(replace(model_config, lora_target_modules="decoder-linear"))
    settings = {"reward": even, "peft_config": lora, "value_model": value_model, "num_generations": 2}
    kept, anew = (make_trainer(name, model=build(architecture), **settings) for name in ("kept", "anew"))
    anew.shared.encoded = lambda sequences, size: sequences
    rows: dict[str, list[int]] = {}
    for name, trainer in (("kept", kept), ("anew", anew)):
        passes = rows[name] = []
        trainer.shared.language_model.get_encoder().register_forward_pre_hook(
            lambda _, args, inputs, passes=passes: passes.append(len(inputs["input_ids"])), with_kwargs=True
        )
        rollout = trainer.collect_rollout(trainer.prompt_rows(0))
        experience, _ = trainer.compute_advantages(rollout)
        assert trainer.update(experience)["val/ratio_first"] == 1.0
    # Four prompts: once to write, once to score and learn; or once for each role of each pass over each half.
    assert rows["kept"] == [4, 4] and sum(rows["anew"]) > 16
    torch.testing.assert_close(weights(kept), weights(anew), **CLOSE)
    assert not any(".encoder." in name for name in weights(kept))


@pytest.mark.parametrize("architecture", sorted(TIED))
def test_a_tied_model_stays_what_was_trained_through_merge_save_and_load(
    make_trainer, model_config, tokenizer, tmp_path, architecture
):
    model = build(architecture).float()
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    trainer = make_trainer(model=model, reward=even, total_episodes=8)
    trainer.train()
    trainer.save_model()
    load_policy(trainer.output_dir, tmp_path / "sft", model_config).save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(trainer.shared.eval().language_model), rtol=1e-4, atol=1e-4)
