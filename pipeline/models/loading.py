"""Load tokenizers and language models, causal or encoder-decoder, from a directory or the Hub; describe their LoRA."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread

import torch
from accelerate import PartialState
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.models.config import ModelConfig
from pipeline.models.decoder_start import check_languages, set_decoder_start

ADAPTER_FILE = "adapter_config.json"
PROBE_SECONDS = 4.0


class ModelNotFoundError(ValueError):
    """A model directory or Hub id that cannot be read; the message names the key and the fix."""


def check_model_path(path: str, key: str) -> None:
    """Refuse a path or Hub id that cannot be a model here, in one sentence naming `key`, before anything is loaded.

    Raises:
        ModelNotFoundError: a directory without a model in it, or a Hub id while the Hub cannot be reached and the
            model is not in the local cache.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file() and not (directory / ADAPTER_FILE).is_file():
            raise ModelNotFoundError(f"{key}: the directory {path!r} holds no model (no config.json in it)")
        return
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelNotFoundError(f"{key}: no directory {path!r}; give an existing model directory or a Hub id")
    if _is_cached(path):
        return
    problem = _hub_problem(path)
    if problem:
        raise ModelNotFoundError(
            f"{key}: {path!r} is not a local directory and could not be read from the Hugging Face Hub "
            f"({problem}); give the path of a model directory, or go online to download it once"
        )


def _is_cached(path: str) -> bool:
    # Not by AutoConfig, which would ask at the terminal whether to run the code of a repository that has some.
    try:
        return any(isinstance(try_to_load_from_cache(path, name), str) for name in ("config.json", ADAPTER_FILE))
    except ValueError:  # not even the form of an id
        return False


def _hub_problem(path: str) -> str | None:
    """Why the Hub does not give a model, within PROBE_SECONDS; None if it does."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(path, timeout=PROBE_SECONDS)
            answers.append(None)
        except Exception as error:  # whatever the network gives rise to
            answers.append(" ".join(str(error).split()).rstrip(".")[:160])

    # In a thread, because the time limit of a request does not cover the look-up of the host's name.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else "no answer"


def read_config(path: str, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's configuration as transformers reads it.

    Raises:
        ValueError: it is broken, or comes with code that the recipe does not trust.
    """
    try:
        return AutoConfig.from_pretrained(
            os.path.expanduser(path), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a broken file gives rise to errors of any kind
        raise unreadable(path, "configuration", "config.json", error) from error


def unreadable(path: object, what: str, file: str, error: Exception) -> ValueError:
    """What is said of a model whose files cannot be read."""
    if "trust_remote_code" in str(error):
        return ValueError(
            f"{str(path)!r} comes with Python code of its own (auto_map), which is not run; read it, and if you trust "
            "it set model.trust_remote_code: true, which is recorded with the run"
        )
    if isinstance(error, pickle.UnpicklingError):
        return ValueError(
            f"the {what} of {str(path)!r} are a pickle of more than tensors, which could run code: it is not loaded; "
            "get the model as safetensors"
        )
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ValueError(f"the {what} of {str(path)!r} cannot be read ({reason}); mend its {file}, or give another model")


def load_config(path: str | Path, config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without its weights; for an adapter its base model's."""
    directory = Path(path).expanduser()
    if (directory / ADAPTER_FILE).is_file():
        return load_config(*adapter_base(directory, config))
    return read_config(str(path), config.model_revision, config.trust_remote_code)


def is_encoder_decoder(config: ModelConfig) -> bool:
    """Whether the model of a recipe is an encoder-decoder, without loading it."""
    if config.from_scratch is not None:
        return config.from_scratch.is_encoder_decoder
    return load_config(config.model_name_or_path, config).is_encoder_decoder


def position_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None where its configuration sets no limit (ALiBi, recurrent models)."""
    # Architectures write it under names of their own, which transformers maps to this one.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(path: str | Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. One without a pad token pads with EOS, which the masks keep apart from real EOS.

    Beside an adapter there may be none; then it is its base model's. Prompts of causal models are padded on the left.

    Raises:
        ValueError: the tokenizer has no EOS token, so completions could never end, or not the recipe's languages.
    """
    directory = Path(path).expanduser()
    if (directory / ADAPTER_FILE).is_file() and not (directory / "tokenizer_config.json").is_file():
        return load_tokenizer(*adapter_base(directory, config))
    codes = {"src_lang": config.src_lang, "tgt_lang": config.tgt_lang}
    languages = {key: code for key, code in codes.items() if code is not None}
    tokenizer = read_tokenizer(path, config.model_revision, config.trust_remote_code)
    check_languages(tokenizer, languages)
    for key, code in languages.items():
        setattr(tokenizer, key, code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {str(path)!r} has no EOS token, so no completion could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not load_config(path, config).is_encoder_decoder:
        tokenizer.padding_side = "left"
    return tokenizer


def read_tokenizer(
    path: str | Path, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer as transformers reads it.

    Raises:
        ValueError: it is broken, or comes with code that the recipe does not trust.
    """
    try:
        return AutoTokenizer.from_pretrained(
            os.path.expanduser(path), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # as in read_config
        raise unreadable(path, "tokenizer", "tokenizer files", error) from error


def adapter_base(directory: Path, config: ModelConfig) -> tuple[str, ModelConfig]:
    """The base model that an adapter names, and the settings to load it with.

    An adapter may come from anyone, and the recipe's trust is in the model that the recipe names: code of any other
    base is not run. A directory has to be that model, or lie below the current directory or the folder of the
    adapter's run, so that no adapter opens what is elsewhere on this machine.

    Raises:
        ValueError: no base is named, or one outside.
    """
    try:
        base = json.loads((directory / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(directory, "adapter configuration", ADAPTER_FILE, error) from error
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{str(directory / ADAPTER_FILE)!r} names no base model, found {base!r}; merge the adapter first"
        )
    if base == config.model_name_or_path:
        return base, config
    place = Path(base).expanduser()
    if place.is_dir() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        roots = (Path.cwd(), directory.resolve().parent.parent)
        if not any(root != Path(root.anchor) and place.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{str(directory / ADAPTER_FILE)!r} names the base model {base!r}, which is outside of {roots[0]} and "
                f"{roots[1]}; if you mean that model set model.model_name_or_path: {base}, or merge the adapter first"
            )
    return base, replace(config, trust_remote_code=False)


def load_model(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """A language model with plain weights, on the CPU; a peft adapter directory is merged into its base.

    The decoder of an encoder-decoder begins as the recipe's languages and the tokenizer say: `set_decoder_start`.
    """
    path = os.path.expanduser(path)
    if (Path(path) / ADAPTER_FILE).is_file():
        return merge_adapter(path, config)
    model_config = load_config(path, config)
    model_class = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model = model_class.from_pretrained(
            str(path),
            config=model_config,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
        )
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise unreadable(path, "weights", "weight files", error) from error
    if model_config.is_encoder_decoder:
        set_decoder_start(model, load_tokenizer(path, config))
    return model


def merge_adapter(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """The base model an adapter was trained on, with the adapter's weights added into it."""
    return _with_adapter(load_model(*adapter_base(Path(path), config)), path)


def _with_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    try:
        return PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise unreadable(path, "adapter weights", "adapter files", error) from error


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
            load_tokenizer(path, config).save_pretrained(temporary)
            temporary.rename(target)
    return target


def load_policy(path: str | Path, base: str | Path, config: ModelConfig) -> PreTrainedModel:
    """A trained policy with plain weights: the adapter in `path` merged into `base`, or the whole model in `path`."""
    if (Path(path) / ADAPTER_FILE).is_file():
        return _with_adapter(load_model(base, config), path)
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
