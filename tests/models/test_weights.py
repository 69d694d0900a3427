"""Weights that are not in the files of a model or an adapter: refused from the headers, and again at loading."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from pipeline.models.config import ModelConfig
from pipeline.models.loading import check_weights, load_model, load_policy
from pipeline.recipe.model_checks import model_notes
from pipeline.rewards.classifier import ClassifierReward, check_classifier

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
KINDS = {
    "llama": {**SIZES, "tie_word_embeddings": False},
    "qwen2": {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50},
    "mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "vocab_size": 50,
    },
}


def build(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **KINDS[kind])
    torch.manual_seed(0)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM.from_config(config)
    return AutoModelForCausalLM.from_config(config)


def change(directory: Path, edit) -> Path:
    """Let `edit` change the saved weights, a mapping from names to tensors."""
    file = next(directory.glob("*.safetensors"))
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def refusals(directory: Path) -> set[str]:
    """What the headers and the loading say about a model; the same."""
    config, messages = ModelConfig(str(directory)), set()
    for look in (check_weights, load_model):
        with pytest.raises(ValueError) as error:
            look(str(directory), config)
        messages.add(str(error.value))
    return messages


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_is_accepted_whether_tied_sharded_or_of_experts(kind, shards, tmp_path):
    model = build(kind)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=2 * size // shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    config = ModelConfig(str(tmp_path))
    empty = check_weights(str(tmp_path), config)
    assert empty.device.type == "meta" and empty.get_input_embeddings().weight.shape[0] == 50
    if kind != "t5" and kind != "bart":
        load_model(tmp_path, config)


def test_a_pytorch_file_is_looked_at_too(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    weights = model.state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert check_weights(str(tmp_path), ModelConfig(str(tmp_path))) is not None
    del weights["lm_head.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (message,) = refusals(tmp_path)
    assert "lm_head.weight" in message


def test_a_bare_base_and_a_classifier_have_no_lm_head(tmp_path):
    model = build("llama")
    model.model.save_pretrained(tmp_path / "bare")
    AutoModelForSequenceClassification.from_config(model.config).save_pretrained(tmp_path / "classifier")
    for name in ("bare", "classifier"):
        (message,) = refusals(tmp_path / name)
        assert str(tmp_path / name) in message and "lack lm_head.weight" in message


def test_a_classifier_with_a_tied_head_is_named_in_the_plan(tmp_path):
    recipe = SimpleNamespace(
        model=ModelConfig(str(tmp_path)), sft=SimpleNamespace(use_peft=False), reward=None, ppo=None
    )
    model = build("qwen2")
    AutoModelForSequenceClassification.from_config(model.config).save_pretrained(tmp_path)
    assert check_weights(str(tmp_path), recipe.model) is not None
    (note,) = model_notes(recipe)
    assert note.startswith("model.model_name_or_path: ") and "Qwen2ForSequenceClassification" in note
    model.save_pretrained(tmp_path)
    assert not model_notes(recipe)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "t5"])
def test_a_bare_base_with_a_tied_head_lacks_nothing(kind, tmp_path):
    build(kind).base_model.save_pretrained(tmp_path)
    assert check_weights(str(tmp_path), ModelConfig(str(tmp_path))) is not None


def test_the_first_weights_of_many_are_named(tmp_path):
    build("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if "layers.1." in name])
    (message,) = refusals(tmp_path)
    assert "model.layers.1.input_layernorm.weight" in message and "and 6 more" in message


def test_experts_that_are_not_there_are_missing(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    change(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if "experts.1." in name])
    with pytest.raises(ValueError, match="experts"):
        check_weights(str(tmp_path), ModelConfig(str(tmp_path)))


def test_weights_of_another_shape_are_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "vocab_size": 60}))
    (message,) = refusals(tmp_path)
    assert "lm_head.weight ([50, 16] instead of [60, 16])" in message


def test_absent_and_broken_weight_files(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size=8000)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    config = ModelConfig(str(tmp_path))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
        check_weights(str(tmp_path), config)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks the weight files {shard.name}"):
        check_weights(str(tmp_path), config)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"mend its model\.safetensors\.index\.json"):
        check_weights(str(tmp_path), config)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no weight files"):
        check_weights(str(tmp_path), config)


def test_a_classifier_without_its_head_is_refused(tokenizer, tmp_path):
    config = AutoConfig.for_model("llama", **KINDS["llama"], num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check_classifier(str(tmp_path), ModelConfig(str(tmp_path)))
    change(tmp_path, lambda weights: weights.pop("score.weight"))
    with pytest.raises(ValueError, match=r"^reward\.model: .* lack score\.weight"):
        check_classifier(str(tmp_path), ModelConfig(str(tmp_path)), "reward.model")
    with pytest.raises(ValueError, match=r"lack score\.weight"):
        ClassifierReward(str(tmp_path), ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("where", ["pad", "template", "text"])
def test_a_classifier_with_fewer_embeddings_than_its_tokenizer_has_tokens_is_refused(tokenizer, tmp_path, where):
    """A token of the tokenizer alone, as padding, in the chat template, or in a text that is scored."""
    path, tokenizer = str(tmp_path), copy.deepcopy(tokenizer)
    config = AutoConfig.for_model("llama", **{**KINDS["llama"], "vocab_size": len(tokenizer)}, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "<new>"} if where == "pad" else {"extra_special_tokens": ["<new>"]})
    if where == "template":
        tokenizer.chat_template = "{% for m in messages %}{{ '<new>' + m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    problem = rf"'<new>' of .* is number {len(tokenizer) - 1}, but the classifier has {len(tokenizer) - 1} embeddings"
    if where == "text":
        with pytest.raises(ValueError, match=rf"^ppo\.reward_model_path: the token {problem}"):
            ClassifierReward(path, ModelConfig(path)).raw_scores(["a"], ["<new>"])
        return
    with pytest.raises(ValueError, match=rf"^reward\.model: the token {problem}"):
        check_classifier(path, ModelConfig(path), "reward.model")


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(T5EncoderModel, T5Config), (CLIPTextModel, CLIPTextConfig)]
)
def test_a_model_of_another_kind_is_refused_in_a_sentence(model_class, config_class, tmp_path):
    sizes = {"num_layers": 1, "d_kv": 8, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    model_class(config_class(vocab_size=20, hidden_size=16, d_model=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"is a {model_class.__name__}, and transformers has no CausalLM") as raised:
        check_weights(str(tmp_path), ModelConfig(str(tmp_path)))
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


# adapters


def trained(model: PreTrainedModel, **options) -> PeftModel:
    """Put an adapter with random weights on a model."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj", "v_proj"], **options})
    network = get_peft_model(model, lora).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return network


@torch.no_grad()
def logits(model, ids=(5, 6, 7, 48)) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.fixture
def base(tmp_path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(base: Path, adapter: Path) -> PreTrainedModel:
    config = ModelConfig(str(base))
    empty = check_weights(str(adapter), config)
    model = load_model(adapter, config)
    assert empty.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    assert torch.equal(logits(load_policy(adapter, base, config)), logits(model))
    return model


GROWN = {
    "whole embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved because they grew": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [3, 50, 51, 52], "lm_head": [50, 51, 52]}},
}


@pytest.mark.parametrize(
    ("tokens", "lacks"), [([50, 51, 52], "no LM head for them"), ([51, 52], "not all in between")]
)
def test_trained_tokens_without_an_embedding_or_head_are_refused_once(tmp_path, tokens, lacks):
    build("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(53)
    adapter = tmp_path / "adapter"
    trained(model, trainable_token_indices={"embed_tokens": tokens}).save_pretrained(
        adapter, save_embedding_layers=False
    )
    with pytest.raises(ValueError, match=rf"up to 52, the base has 50 embeddings, and it brings {lacks}\)") as raised:
        check_weights(str(adapter), ModelConfig(str(tmp_path / "base")))
    assert str(raised.value).count("does not fit") == 1


@pytest.mark.parametrize("options", GROWN.values(), ids=GROWN)
@pytest.mark.parametrize("grow", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_with_trained_embeddings_over_a_grown_vocabulary(tmp_path, options, grow, kind):
    base = tmp_path / "base"
    build(kind).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    tied = model.config.tie_word_embeddings
    if "trainable_token_indices" in options and not grow:
        options = {"trainable_token_indices": [3, 7]}
    model.resize_token_embeddings(50 + grow)
    network = trained(model, **options)
    network.save_pretrained(tmp_path / "adapter")
    if tied and (options is GROWN["saved because they grew"] or options is GROWN["trained tokens"]):
        with pytest.raises(ValueError, match="shares its weights"):
            check_weights(str(tmp_path / "adapter"), ModelConfig(str(base)))
        return
    ids = (5, 3, 7, 49 + grow)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "adapter"), ids), logits(network, ids))


def test_new_tokens_that_nobody_trained_are_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(53)
    trained(model, trainable_token_indices={"embed_tokens": [50, 51, 52]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit its base"):
        check_weights(str(tmp_path / "adapter"), ModelConfig(str(base)))


def other_base(tmp_path: Path, **sizes) -> Path:
    config = AutoConfig.for_model("llama", **{**KINDS["llama"], **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("sizes", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_base_is_refused(base, tmp_path, sizes):
    adapter = tmp_path / "adapter"
    trained(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(adapter)
    other = other_base(tmp_path, **sizes)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(other)}))
    (message,) = refusals_of_adapter(adapter, other)
    assert str(adapter) in message and str(other) in message and "\n" not in message


def refusals_of_adapter(adapter: Path, base: Path) -> set[str]:
    config, messages = ModelConfig(str(base)), set()
    for look in (lambda: check_weights(str(adapter), config), lambda: load_policy(adapter, base, config)):
        with pytest.raises(ValueError) as error:
            look()
        messages.add(str(error.value))
    return messages


@pytest.mark.parametrize("name", ["q_proj", "embed_tokens"])
def test_an_adapter_that_lacks_weights_is_refused(base, tmp_path, name):
    adapter = tmp_path / "adapter"
    trained(AutoModelForCausalLM.from_pretrained(base), modules_to_save=["embed_tokens"]).save_pretrained(adapter)
    change(adapter, lambda weights: [weights.pop(key) for key in list(weights) if name in key])
    (message,) = refusals_of_adapter(adapter, base)
    assert "it lacks" in message and name in message


def test_the_base_of_a_run_that_was_moved_is_beside_the_policy(base, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "one"
    shutil.copytree(base, run / "sft")
    network = trained(AutoModelForCausalLM.from_pretrained(run / "sft"))
    network.save_pretrained(run / "ppo")
    (run).rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    model = load_model(tmp_path / "moved" / "ppo", ModelConfig("some/model"))
    torch.testing.assert_close(logits(model), logits(network))
