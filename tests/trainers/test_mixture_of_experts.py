"""Mixtures of experts: what the default adapter leaves out, and what SFT saves of the router's settings."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from ppo_toys import training_steps, weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.models.adapters import adapter_config, fused_experts
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_policy, lora_config
from pipeline.recipe.model_checks import check_models, model_notes
from pipeline.trainers.huggingface.gather_weights import save_plain_model
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}


@pytest.fixture
def mixture(tokenizer, tmp_path):
    """Each call saves a tiny mixture of experts with the tokenizer, and returns its directory."""

    def save(kind: str, **settings) -> str:
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        settings = {**SIZES, **KINDS[kind], **special, "vocab_size": len(tokenizer), **settings}
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_adapter_leaves_experts_out(mixture, kind, dropout):
    path = mixture(kind)
    config = ModelConfig(path, lora_r=2, lora_dropout=dropout)
    model = load_model(path, config)
    network = get_peft_model(model, adapter_config(model, lora_config(config)))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert any("q_proj" in name for name in trained) and any("o_proj" in name for name in trained)
    assert not any("expert" in name or "gate" in name or "lm_head" in name for name in trained)
    recipe = SimpleNamespace(model=config, sft=SimpleNamespace(use_peft=True), reward=None, ppo=None)
    (note,) = model_notes(recipe)
    assert note.startswith("model.lora_target_modules: ") and "layers.1.mlp.experts" in note
    recipe.sft.use_peft = False
    assert not model_notes(recipe)


def test_a_dense_model_has_no_experts(taught):
    assert not fused_experts(taught())


# Names that peft takes for the experts of each kind: it adapts the tensors of all experts.
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
EXPERT_NAMES = {"mixtral": ["w1", "w2", "w3"], "qwen3_moe": PROJECTIONS, "glm4_moe": PROJECTIONS}
CASES = [
    *((kind, "all-linear", 0.05) for kind in KINDS),
    *((kind, ["q_proj", *names], 0.0) for kind, names in EXPERT_NAMES.items()),
]


@pytest.mark.parametrize(("kind", "targets", "dropout"), CASES)
def test_an_adapter_goes_through_sft_and_ppo_and_merges(
    mixture, tokenizer, examples, make_trainer, tmp_path, kind, targets, dropout, fresh_accelerate
):
    path = mixture(kind)
    config = ModelConfig(path, lora_r=2, lora_dropout=dropout, lora_target_modules=targets)
    trainer = build_sft_trainer(
        load_model(path, config),
        sft_arguments({"max_steps": 2, "learning_rate": 0.05, "max_length": 64, "bf16": False}, tmp_path / "sft", 0),
        tokenizer,
        examples.select(range(8)),
        examples.select(range(8, 12)),
        lora_config(config),
        tmp_path / "sft" / "metrics.jsonl",
    )
    trainer.train()
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    expected = logits(adapted)
    save_plain_model(trainer, path, config, tmp_path / "sft")
    model = load_model(tmp_path / "sft", config)
    assert moved(logits(model), expected) < 1e-5 < 1e-3 < moved(logits(load_model(path, config)), expected)
    ppo = make_trainer(
        model=model, reward=even, peft_config=lora_config(config), total_episodes=16, value_model="adapter"
    )
    before = weights(ppo)
    ppo.train()
    first, second = training_steps(ppo.output_dir)
    assert first["objective/kl"] == 0.0 and first["val/ratio_first"] == second["val/ratio_first"] == 1.0
    assert second["objective/kl"] != 0.0 and first["val/ratio"] != 1.0
    changed = {name for name, value in weights(ppo).items() if not torch.equal(value, before[name])}
    assert any("experts" in name for name in changed) == (targets != "all-linear")
    ppo.save_model()
    merged = load_policy(ppo.output_dir, tmp_path / "sft", config)
    assert moved(logits(merged), logits(ppo.shared.language_model)) < 1e-5 < 1e-3 < moved(logits(merged), expected)


def even(prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
    """The share of even token ids: something random models differ in."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 20).unsqueeze(0), use_cache=False).logits


def moved(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize(
    ("targets", "dropout", "words"),
    [
        (["q_proj", *EXPERT_NAMES["qwen3_moe"]], 0.0, None),
        (["q_proj", *EXPERT_NAMES["qwen3_moe"]], 0.05, "lora_dropout != 0"),
        (["q_proj", "gate_proj"], 0.0, "without also targeting up_proj"),
        ("all-linear", 0.05, None),
    ],
)
def test_layers_of_experts_that_get_no_adapter_are_refused_before_a_run(mixture, targets, dropout, words):
    path = mixture("qwen3_moe")
    config = ModelConfig(path, lora_r=2, lora_dropout=dropout, lora_target_modules=targets)
    recipe = SimpleNamespace(
        model=config,
        task=SimpleNamespace(config=None),
        sft=SimpleNamespace(use_peft=True),
        reward=None,
        ppo=None,
        sft_is_external=False,
        eval=SimpleNamespace(further_systems=[]),
    )
    if words is None:
        return check_models(recipe)
    with pytest.raises(ValueError, match=r"model\.lora_target_modules: .* this qwen3_moe") as refusal:
        check_models(recipe)
    assert words in str(refusal.value) and "model.lora_dropout: 0" in str(refusal.value)


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("before", [False, True])
def test_sft_saves_the_routers_settings_of_its_base(
    mixture, tokenizer, examples, tmp_path, use_peft, before, fresh_accelerate
):
    path = mixture("mixtral", output_router_logits=before, router_aux_loss_coef=0.03)
    config = ModelConfig(path, lora_r=2)
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 64, "bf16": False}
    trainer = build_sft_trainer(
        load_model(path, config),
        sft_arguments({**arguments, "router_aux_loss_coef": 0.5, "disable_tqdm": True}, tmp_path / "sft", 0),
        tokenizer,
        examples.select(range(8)),
        examples.select(range(8, 12)),
        lora_config(config) if use_peft else None,
        tmp_path / "sft" / "metrics.jsonl",
    )
    trainer.train()
    assert trainer.aux_loss_enabled
    save_plain_model(trainer, path, config, tmp_path / "sft")
    saved = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert (saved["output_router_logits"], saved["router_aux_loss_coef"]) == (before, 0.03)
    assert load_model(tmp_path / "sft", config).config.output_router_logits is False  # PPO and evaluation need none
