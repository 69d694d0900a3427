"""SFT of models that differ from Llama: the names of their weights, their positions, routers and settings."""

import json

import pytest
import torch
from demo_run import recipe_with, write_demo
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_config, load_model
from pipeline.stages.directory import RunDirectory
from pipeline.stages.task import sft_base
from pipeline.trainers.huggingface.completion_head import CompletionHeadSFTTrainer
from pipeline.trainers.huggingface.gather_weights import save_plain_model
from pipeline.trainers.huggingface.resumable import ResumableTrainer
from pipeline.trainers.huggingface.sft import (
    _max_length,
    _widen_trained_weights,
    build_sft_trainer,
    sft_arguments,
    trainer_class,
)

SIZES = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 64}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
SETTINGS = {"bf16": False, "max_length": 64, "disable_tqdm": True, "gradient_checkpointing": False, "max_steps": 1}
UNUSED = ModelConfig(model_name_or_path="unused")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def tiny(architecture: str, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def make_trainer(tokenizer, examples, tmp_path):
    """Each call builds a trainer of a model over a few examples."""

    def make(model: PreTrainedModel, adapter: LoraConfig | None = None, **settings) -> ResumableTrainer:
        arguments = sft_arguments({**SETTINGS, **settings}, tmp_path / "sft", 0)
        rows = examples.select(range(8)), examples.select(range(8, 12))
        return build_sft_trainer(model, arguments, tokenizer, *rows, adapter, tmp_path / "metrics.jsonl")

    return make


@pytest.mark.parametrize("load", ["checkpoint", "best"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("gpt_neox", {"tie_word_embeddings": False}), ("qwen3_moe", EXPERTS)],
)
def test_all_weights_of_a_checkpoint_are_loaded(make_trainer, tmp_path, architecture, options, load):
    """Files have the names of the Hub, which those of some modules differ from."""
    trainer = make_trainer(tiny(architecture, **options))
    trainer.save_model(str(tmp_path / "saved"))
    expected = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.zero_()
    if load == "best":
        trainer.state.best_model_checkpoint = str(tmp_path / "saved")
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert all(torch.equal(weight, expected[name]) for name, weight in trainer.model.state_dict().items())


def test_what_trains_over_4_bits_is_in_float32():
    network = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    network.bfloat16()  # as TRL leaves it
    _widen_trained_weights(network)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}  # not in 4 bits: the recipe's choice
    network.get_base_model().config.quantization_config = {"load_in_4bit": True}
    _widen_trained_weights(network)
    dtypes = {weight.requires_grad: weight.dtype for weight in network.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_the_decoder_has_room_for_what_it_begins_with(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 60}
    for forced, expected in ((0, 31), (None, 32)):  # `</s> <s>` before a completion, or `</s>` alone
        config = AutoConfig.for_model("bart", **sizes, max_position_embeddings=32, forced_bos_token_id=forced)
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.generation_config.forced_bos_token_id = forced
        assert _max_length(model, sft_arguments({"max_length": 100, "bf16": False}, tmp_path, 0)) == expected


def test_an_inconsistent_generation_config_is_mended_before_it_cannot_be_saved(base_directory, tmp_path):
    model = load_model(base_directory, UNUSED)
    model.save_pretrained(tmp_path)
    odd = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    model = load_model(tmp_path, UNUSED)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "again")
    saved = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (saved.temperature, saved.eos_token_id, saved.pad_token_id) == (None, 2, 0)


def test_packing_that_cuts_says_so(make_trainer, capsys):
    trainer = make_trainer(tiny("llama"), packing=True, max_length=9)
    assert "are cut" in capsys.readouterr().err and max(map(len, trainer.train_dataset["input_ids"])) <= 9
    make_trainer(tiny("llama"), packing=True, packing_strategy="wrapped", max_length=9)
    assert "are cut" not in capsys.readouterr().err


def test_labels_are_not_smoothed_in_the_evaluation_on_a_gpu_either(monkeypatch, tmp_path):
    smoothed, plain = (
        sft_arguments({"label_smoothing_factor": value, "bf16": False}, tmp_path, 0) for value in (0.1, 0.0)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trainer_class(tiny("llama"), smoothed) is CompletionHeadSFTTrainer
    assert not issubclass(trainer_class(tiny("llama"), plain), CompletionHeadSFTTrainer)


def test_a_router_whose_experts_trl_cannot_count_trains_without_its_loss(make_trainer, capsys):
    trainer = make_trainer(tiny("granitemoe", **GRANITE))
    assert trainer.train().global_step == 1
    assert "no loss of the router" in capsys.readouterr().err


def test_the_saved_model_has_the_settings_of_its_base(make_trainer, base_directory, tmp_path):
    trainer = make_trainer(load_model(base_directory, UNUSED))
    trainer.train()
    assert trainer.model.config.use_cache is False  # of transformers' trainer, while it trains
    save_plain_model(trainer, base_directory, UNUSED, tmp_path / "plain")
    before, after = load_config(base_directory, UNUSED), load_config(tmp_path / "plain", UNUSED)
    assert after.use_cache is before.use_cache is True


def test_over_an_adapter_sft_starts_from_plain_weights(base_directory, tmp_path, monkeypatch):
    """Which may then be held in bfloat16 or in 4 bits."""
    network = get_peft_model(load_model(base_directory, UNUSED), LoraConfig(target_modules=["q_proj"]))
    torch.nn.init.ones_(next(weight for name, weight in network.named_parameters() if "lora_B" in name))
    network.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    write_demo()
    model = ["model.from_scratch=null", f"model.model_name_or_path={tmp_path / 'adapter'}"]
    recipe, run = recipe_with(*model), RunDirectory(tmp_path / "run")
    base = sft_base(recipe, run, tmp_path / "run" / "sft")
    assert base == tmp_path / "run" / "sft" / "base"
    merged, expected = (load_model(path, UNUSED).state_dict() for path in (base, tmp_path / "adapter"))
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    whole = recipe_with(*model, "sft.use_peft=false")
    assert sft_base(whole, run, tmp_path) == str(tmp_path / "adapter")
