"""Models and tokenizers from directories, and what is said where there is none."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, get_peft_model

from pipeline.models.adapters import adapter_config
from pipeline.models.config import ModelConfig
from pipeline.models.hub import ModelNotFoundError, check_model_path
from pipeline.models.loading import (
    is_encoder_decoder,
    load_model,
    load_policy,
    load_tokenizer,
    lora_config,
    merged,
    weights_dtype,
)

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def adapter(taught, tmp_path):
    """An adapter with random weights over the taught model, in a directory; with its own logits."""
    torch.manual_seed(0)
    model = get_peft_model(taught(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def test_a_hub_id_offline_is_one_sentence_that_names_the_key(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    connections = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connections.append(address))
    with pytest.raises(ModelNotFoundError) as error:
        check_model_path("nobody/no-such-model", "model.model_name_or_path")
    message = str(error.value)
    assert message.startswith("model.model_name_or_path: ") and "'nobody/no-such-model'" in message
    assert "HF_HUB_OFFLINE is set" in message and "\n" not in message
    assert not connections  # nothing waits for a network that is not there


@pytest.mark.parametrize("path", ["./missing", "/nowhere/model", "~/missing-model", "runs/some/model"])
def test_a_directory_that_is_not_there(path):
    with pytest.raises(ModelNotFoundError, match="no directory") as error:
        check_model_path(path, "ppo.sft_model_path")
    assert str(error.value).startswith("ppo.sft_model_path: ") and path in str(error.value)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no model \(no config\.json in it\)"):
        check_model_path(str(tmp_path), "model.model_name_or_path")


def test_models_and_adapters_are_found(taught_directory, adapter):
    check_model_path(str(taught_directory), "model.model_name_or_path")
    check_model_path(str(adapter[0]), "model.model_name_or_path")


def test_an_adapter_directory_is_merged_into_its_base(taught_directory, adapter, model_config, taught):
    directory, expected = adapter
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        taught_directory
    )
    for model in (
        load_model(directory, model_config),
        load_policy(directory, taught_directory, model_config),
    ):
        assert not any("lora" in name for name, _ in model.named_modules())
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (logits(taught()) - expected).abs().max() > 0.01


def test_a_policy_that_is_a_whole_model_is_loaded_as_it_is(taught_directory, base_directory, model_config, taught):
    assert torch.equal(logits(load_policy(taught_directory, base_directory, model_config)), logits(taught()))


def test_a_tilde_is_the_home_directory(taught_directory, model_config, taught, monkeypatch):
    monkeypatch.setenv("HOME", str(taught_directory.parent))
    path = f"~/{taught_directory.name}"
    check_model_path(path, "model.model_name_or_path")
    assert load_tokenizer(path, model_config).eos_token == "</s>"
    assert torch.equal(logits(load_model(path, model_config)), logits(taught()))


def test_precision(taught_directory):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        assert load_model(taught_directory, ModelConfig(str(taught_directory), dtype=name)).dtype == dtype


def test_a_frozen_base_is_bfloat16_on_a_gpu_and_everything_else_float32(model_config):
    saves = replace(model_config, lora_modules_to_save=["lm_head"])
    for config, frozen, bf16_gpu, dtype in (
        (model_config, True, True, torch.bfloat16),
        (model_config, True, False, torch.float32),  # a CPU
        (model_config, False, True, torch.float32),  # all weights train, or an adapter is merged
        (saves, True, True, torch.float32),  # some weights of the base train whole
        (replace(model_config, dtype="float32"), True, True, torch.float32),
        (replace(model_config, dtype="bfloat16"), False, False, torch.bfloat16),
        (replace(model_config, dtype="auto"), True, True, "auto"),
    ):
        assert weights_dtype(config, frozen, bf16_gpu) == dtype


def test_an_adapter_over_a_rounded_base_is_merged_in_float32(taught_directory, model_config):
    rounded = load_model(taught_directory, replace(model_config, dtype="bfloat16"))
    network = get_peft_model(rounded, adapter_config(rounded, lora_config(model_config)))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e-4)
    plain = merged(network, taught_directory, model_config)
    assert plain.dtype == torch.float32
    before = dict(load_model(taught_directory, model_config).named_parameters())
    steps = [(weight - before[name]).abs().max() for name, weight in plain.named_parameters()]
    assert 0 < max(steps) < 1e-3  # the adapter alone, no rounding to bfloat16


def test_attention_implementation(taught_directory):
    for name in ("eager", "sdpa"):
        config = ModelConfig(str(taught_directory), attn_implementation=name)
        assert load_model(taught_directory, config).config._attn_implementation == name


def test_an_encoder_decoder_loads_as_one_and_its_adapter_merges(taught_t5_directory, t5_config, tmp_path):
    config = replace(t5_config, from_scratch=None, model_name_or_path=str(taught_t5_directory))
    model = load_model(taught_t5_directory, config).eval()
    assert type(model).__name__ == "T5ForConditionalGeneration" and is_encoder_decoder(config)
    adapted = get_peft_model(model, adapter_config(model, lora_config(config))).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(taught_t5_directory)
    adapted.save_pretrained(tmp_path)
    load_tokenizer(taught_t5_directory, config).save_pretrained(tmp_path)
    ids = {"input_ids": torch.tensor([[5, 6, 2]]), "decoder_input_ids": torch.tensor([[1, 7, 8]])}
    with torch.no_grad():
        expected = adapted(**ids).logits
        torch.testing.assert_close(load_model(tmp_path, config).eval()(**ids).logits, expected)
        plain = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path).eval()(**ids).logits
    torch.testing.assert_close(plain, expected)
    assert is_encoder_decoder(replace(config, model_name_or_path=str(tmp_path)))
    assert load_tokenizer(tmp_path, config).padding_side == "right"


def change_tokenizer(source, target, **changes):
    """A copy of a tokenizer directory with other settings; None removes one."""
    shutil.copytree(source, target)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (target / name).is_file():
            settings = json.loads((target / name).read_text()) | changes
            kept = {key: value for key, value in settings.items() if value is not None}
            (target / name).write_text(json.dumps(kept))
    return target


def test_a_tokenizer_without_pad_pads_with_eos(base_directory, model_config, tmp_path):
    assert load_tokenizer(base_directory, model_config).pad_token == "<pad>"
    tokenizer = load_tokenizer(change_tokenizer(base_directory, tmp_path / "copy", pad_token=None), model_config)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_without_eos_is_refused(base_directory, model_config, tmp_path):
    directory = change_tokenizer(base_directory, tmp_path / "copy", eos_token=None)
    with pytest.raises(ValueError, match="has no EOS token"):
        load_tokenizer(directory, model_config)


def test_lora_keys_reach_the_adapter(taught_directory):
    config = ModelConfig(
        str(taught_directory),
        lora_r=3,
        lora_alpha=7,
        lora_dropout=0.25,
        lora_target_modules=["q_proj"],
        lora_modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
    )
    found = lora_config(config)
    assert (found.r, found.lora_alpha, found.lora_dropout) == (3, 7, 0.25)
    assert found.target_modules == {"q_proj"} and found.modules_to_save == ["lm_head"]
    assert found.use_rslora and found.use_dora


def test_processes_that_share_a_model_map_its_files(base_directory, model_config, monkeypatch):
    """The weights are pages of the file, which the processes of a machine have in memory once."""
    plain = load_model(base_directory, model_config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    mapped = load_model(base_directory, model_config)
    assert mapped.generation_config.to_dict() == plain.generation_config.to_dict()
    assert mapped.config.to_dict() == plain.config.to_dict() and mapped.name_or_path == plain.name_or_path
    weights = dict(mapped.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(weights[name], weight)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    file = str((base_directory / "model.safetensors").resolve())
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1] == file]
    assert all(any(low <= w.data_ptr() < high for low, high in ranges) for w in weights.values())
    bf16 = load_model(base_directory, replace(model_config, dtype="bfloat16"))  # another type: no file has it
    assert bf16.dtype == torch.bfloat16
