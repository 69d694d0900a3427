"""Load tokenizers and language models, causal or encoder-decoder, from a directory or the Hub; describe their LoRA."""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.models.adapters import attach_adapter
from pipeline.models.config import ModelConfig
from pipeline.models.decoder_start import check_decoder, check_languages, set_decoder_start
from pipeline.models.hub import (
    ADAPTER_FILE,
    adapter_base,
    pinned_revision,
    read_config,
    read_ends,
    read_tokenizer,
    unreadable,
)
from pipeline.models.kernels.fused_layers import fuse_layers
from pipeline.models.processors import save_processor
from pipeline.models.quantized import use_one_product
from pipeline.models.speech import reads_sound
from pipeline.models.text import set_chat_template
from pipeline.models.weights import check_loaded_weights, empty_model, mapped_weights
from pipeline.runtime.devices import gpu_has_bf16
from pipeline.runtime.distributed import launched_engine


def load_config(path: str | Path, config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without its weights; for an adapter its base model's."""
    directory = Path(path).expanduser()
    if (directory / ADAPTER_FILE).is_file():
        return load_config(*adapter_base(directory, config))
    return read_config(str(path), config.revision_of(path), config.trust_remote_code)


def is_encoder_decoder(config: ModelConfig) -> bool:
    """Whether the model of a recipe is an encoder-decoder, without loading it."""
    if config.from_scratch is not None:
        return config.from_scratch.is_encoder_decoder
    return load_config(config.model_name_or_path, config).is_encoder_decoder


def position_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None where its configuration sets no limit (ALiBi, recurrent models)."""
    if reads_sound(config):  # the positions of its decoder
        return config.max_target_positions
    # Architectures write it under names of their own, which transformers maps to this one.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def sliding_window(config: PretrainedConfig) -> int | None:
    """How many tokens the layers with a sliding window read, the newest included; None for a model without any."""
    return config.get_text_config().to_dict().get("sliding_window")


def load_tokenizer(path: str | Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. One without a pad token pads with EOS, which the masks keep apart from real EOS.

    Beside an adapter there may be none; then it is its base model's. Prompts of causal models are padded on the left.

    Raises:
        ValueError: the tokenizer has no EOS token, so completions could never end, not the recipe's languages, or no
            chat template for the recipe's `chat_template_kwargs`.
    """
    directory = Path(path).expanduser()
    if (directory / ADAPTER_FILE).is_file() and not (directory / "tokenizer_config.json").is_file():
        return load_tokenizer(*adapter_base(directory, config))
    codes = {"src_lang": config.src_lang, "tgt_lang": config.tgt_lang}
    languages = {key: code for key, code in codes.items() if code is not None}
    tokenizer = read_tokenizer(path, config.revision_of(path), config.trust_remote_code)
    set_chat_template(tokenizer, config.chat_template, config.chat_template_kwargs)
    check_languages(tokenizer, languages)
    for key, code in languages.items():
        setattr(tokenizer, key, code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {str(path)!r} has no EOS token, so no completion could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model_config = load_config(path, config)
    if not model_config.is_encoder_decoder:
        tokenizer.padding_side = "left"
    tokenizer.turn_ends = read_ends(path, model_config, config.revision_of(path))
    return tokenizer


def language_model_class(config: PretrainedConfig) -> type:
    """Return the auto class of transformers that loads the language model of a configuration."""
    if reads_sound(config):
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_weights(path: str | Path, config: ModelConfig) -> PreTrainedModel | None:
    """Refuse a model or adapter whose files lack weights, from the headers of the files alone.

    Returns:
        The model without its weights, with the embeddings it will have; None for a model that comes with code of its
        own, which is checked when it is loaded.

    Raises:
        ValueError: weights that are missing or have other shapes than the model.
    """
    path = os.path.expanduser(path)
    if (Path(path) / ADAPTER_FILE).is_file():
        base = check_weights(*adapter_base(Path(path), config))
        return None if base is None else attach_adapter(base, path).get_base_model()
    model_config = load_config(path, config)
    if "auto_map" in model_config.to_dict():
        return None
    return empty_model(
        language_model_class(model_config), path, model_config, pinned_revision(path, config.revision_of(path))
    )


def weights_dtype(config: ModelConfig, frozen: bool, bf16_gpu: bool) -> torch.dtype | str:
    """Choose the type of a model's weights: the recipe's `dtype`, or by what is done with the model.

    Weights that are trained or merged stay in float32, where small steps are not rounded away. Those that an adapter
    alone trains over are only read, and in bfloat16 they take half the memory. `auto` is a choice of transformers.
    """
    if config.dtype is not None:
        return config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return torch.bfloat16 if frozen and bf16_gpu and not config.lora_modules_to_save else torch.float32


def load_model(path: str | Path, config: ModelConfig, frozen: bool = False) -> PreTrainedModel:
    """A language model with plain weights, on the CPU; a peft adapter directory is merged into its base.

    With `frozen`, which says that only an adapter over it will train, its weights may be in bfloat16
    (`weights_dtype`), and those of its dense layers are held in 4 bits if the recipe wants that; the model is then on
    this process's device, where it has to stay. The decoder of an encoder-decoder begins as the recipe's languages
    and the tokenizer say: `set_decoder_start`.
    """
    path = os.path.expanduser(path)
    if (Path(path) / ADAPTER_FILE).is_file():
        return merge_adapter(path, config)
    model_config = load_config(path, config)
    # An engine shards weights of one type, and those of the adapter are float32.
    bf16_gpu = frozen and launched_engine() is None and gpu_has_bf16(PartialState().device)
    dtype = weights_dtype(config, frozen, bf16_gpu)
    revision = pinned_revision(str(path), config.revision_of(path))
    try:
        kind, source = _weights_source(path, model_config, dtype, revision, frozen and config.load_in_4bit)
        model, info = kind.from_pretrained(
            **source,
            config=model_config,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            ignore_mismatched_sizes=True,  # refused below, in one sentence
            output_loading_info=True,
            **(_in_4_bits(config, dtype) if frozen and config.load_in_4bit else {}),
        )
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise unreadable(path, "weights", "weight files", error) from error
    check_loaded_weights(model, path, info)
    fuse_layers(model)
    if "state_dict" in source:
        _name_after(model, path)
    _mend_generation_config(model)
    if "output_router_logits" in model.config.get_text_config().to_dict():
        model.config.get_text_config().output_router_logits = False  # for training alone: TRL asks for it by itself
    if frozen and config.load_in_4bit:
        use_one_product(model)
    if model_config.is_encoder_decoder and not reads_sound(model_config):  # whose prompts hold what is given
        check_decoder(model)
        set_decoder_start(model, load_tokenizer(path, config))
    return model


def _weights_source(
    path: str, config: PretrainedConfig, dtype: torch.dtype | str, revision: str, in_4_bits: bool
) -> tuple[type, dict[str, object]]:
    """Return the class of a model and what its weights are loaded from: where it will be sharded, files mapped once.

    Then the processes of a machine do not each hold a copy of them while they load.
    """
    kind, named = language_model_class(config), {"pretrained_model_name_or_path": str(path)}
    if launched_engine() != "FSDP" or in_4_bits or "auto_map" in config.to_dict() or not Path(path).is_dir():
        return kind, named
    weights = mapped_weights(path, dtype, revision)
    if weights is None:
        return kind, named
    with torch.device("meta"):
        return type(kind.from_config(config)), {"pretrained_model_name_or_path": None, "state_dict": weights}


def _name_after(model: PreTrainedModel, path: str) -> None:
    """Give a model what transformers takes from the directory that it loads weights from, besides the weights."""
    model.name_or_path = model.config.name_or_path = str(path)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Remove sampling keys that transformers calls inconsistent: it would not save them with the trained model."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(model.generation_config, key, None)


def _in_4_bits(config: ModelConfig, dtype: torch.dtype | str) -> dict[str, object]:
    """Arguments of from_pretrained. The dense layers compute in `dtype`, as in TRL, and the LM head stays as it is."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().device}}


def merged(
    network: PeftModel, base: str | Path, config: ModelConfig, weights: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """What an adapter over `base` has learnt as plain weights.

    They are never rounded to the 4 bits, nor to the bfloat16 of `weights_dtype`, that the adapter was trained over.
    `weights`: those of `network`, where it is sharded and holds a part of them alone.
    """
    is_rounded = config.load_in_4bit or (config.dtype is None and network.get_base_model().dtype != torch.float32)
    if not is_rounded and weights is None:
        return network.merge_and_unload()
    plain = get_peft_model(load_model(base, config), network.peft_config["default"])
    learnt = get_peft_model_state_dict(network, state_dict=weights, save_embedding_layers=False)
    set_peft_model_state_dict(plain, learnt)
    return plain.merge_and_unload()


def merge_adapter(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """The base model an adapter was trained on, with the adapter's weights added into it."""
    return attach_adapter(load_model(*adapter_base(Path(path), config)), path).merge_and_unload()


def plain_model_directory(path: str | Path, config: ModelConfig, target: Path) -> str | Path:
    """Where a model's plain weights are: `path`, or for an adapter `target`, into which it is merged once.

    An adapter trained over the merged model names this directory as its base, so that peft loads it over the weights
    it was trained on. One process merges, others wait.
    """
    if not (Path(path).expanduser() / ADAPTER_FILE).is_file():
        return path
    with PartialState().main_process_first():
        if not target.is_dir():
            temporary = target.with_name(target.name + ".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            load_model(path, config).save_pretrained(temporary)
            save_processor(load_tokenizer(path, config), load_config(path, config), temporary)
            temporary.rename(target)
    return target


def load_policy(path: str | Path, base: str | Path, config: ModelConfig) -> PreTrainedModel:
    """A trained policy with plain weights: the adapter in `path` merged into `base`, or the whole model in `path`."""
    if (Path(path) / ADAPTER_FILE).is_file():
        return attach_adapter(load_model(base, config), path).merge_and_unload()
    return load_model(path, config)


def lora_config(config: ModelConfig) -> LoraConfig:
    """The peft adapter a recipe's `lora_*` keys describe; `adapter_config` fits it to a model."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )
