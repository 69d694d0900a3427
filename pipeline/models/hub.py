"""Which models may be opened: directories, Hub ids and their commits, bases of adapters; errors of broken files."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models.config import ModelConfig
from pipeline.runtime.hub import PROBE_SECONDS, ask_hub

ADAPTER_FILE = "adapter_config.json"
CONFIG_FILES = ("config.json", ADAPTER_FILE)


class ModelNotFoundError(ValueError):
    """A model directory or Hub id that cannot be read; the message names the key and the fix."""


def check_model_path(path: str, key: str, revision: str = "main") -> None:
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
    if cached_commit(path, revision) is not None:
        return
    problem = ask_hub(path, "model", None if revision == "main" else revision).problem
    if problem:
        raise ModelNotFoundError(
            f"{key}: {path!r} is not a local directory and could not be read from the Hugging Face Hub "
            f"({problem}); give the path of a model directory, or go online to download it once"
        )


def cached_commit(path: str, revision: str = "main") -> str | None:
    """Return the commit of a Hub model's snapshot in the local cache, or None without one; it needs no network."""
    # Not by AutoConfig, which would ask at the terminal whether to run the code of a repository that has some.
    try:
        files = [try_to_load_from_cache(path, name, revision=revision) for name in CONFIG_FILES]
    except ValueError:  # the path does not even have the form of an id
        return None
    return next((Path(file).parent.name for file in files if isinstance(file, str)), None)


def pinned_revision(path: str, revision: str = "main") -> str:
    """Return the commit of a Hub model in the local cache, else `revision`.

    All stages of a run load the same snapshot by it, also when `main` moves on the Hub in between.
    """
    return revision if Path(path).expanduser().is_dir() else cached_commit(path, revision) or revision


def fetch_commit(path: str, revision: str = "main") -> None:
    """Download the configuration of a Hub model that is not in the local cache, so that its commit is known."""
    if Path(path).expanduser().is_dir() or cached_commit(path, revision) is not None:
        return
    for name in CONFIG_FILES:
        try:
            hf_hub_download(path, name, revision=revision, etag_timeout=PROBE_SECONDS)
            return
        except (OSError, ValueError):  # a model that cannot be had is refused by name when it is loaded
            continue


def read_config(path: str, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's configuration with transformers.

    Raises:
        ValueError: it is broken, or comes with code that the recipe does not trust.
    """
    try:
        return AutoConfig.from_pretrained(
            os.path.expanduser(path), revision=pinned_revision(path, revision), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a broken file gives rise to errors of any kind
        raise unreadable(path, "configuration", "config.json", error) from error


def unreadable(path: object, what: str, file: str, error: Exception) -> ValueError:
    """Return the error for a model whose files cannot be read."""
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


def read_tokenizer(
    path: str | Path, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Read a tokenizer with transformers.

    Raises:
        ValueError: it is broken, or comes with code that the recipe does not trust.
    """
    try:
        return AutoTokenizer.from_pretrained(
            os.path.expanduser(path),
            revision=pinned_revision(str(path), revision),
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # as in read_config
        raise unreadable(path, "tokenizer", "tokenizer files", error) from error


def read_ends(path: str | Path, config: PretrainedConfig, revision: str = "main") -> list[int]:
    """Return the tokens at which generation ends a model's texts, as its generation config says, or its `config`."""
    try:
        settings = GenerationConfig.from_pretrained(
            os.path.expanduser(path), revision=pinned_revision(str(path), revision)
        )
    except (OSError, ValueError):  # there is none
        settings = config.get_text_config(decoder=True)
    ends = settings.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def adapter_base(directory: Path, config: ModelConfig) -> tuple[str, ModelConfig]:
    """Return the base model that an adapter names, and the settings to load it with.

    An adapter may come from anyone. The recipe trusts only the model that it names itself, so code of any other base
    is not run. A base that is a directory has to be that model, or lie below the current directory or the folder of
    the adapter's run: no adapter opens other directories of this machine. Where a run was moved or copied, its SFT
    model is found beside the adapter.

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
    base_directory = Path(base).expanduser()
    if not base_directory.is_dir():
        base_directory = moved_base(directory, base_directory)
        base = str(base_directory) if base_directory.is_dir() else base
    if base_directory.is_dir() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        roots = (Path.cwd(), directory.resolve().parent.parent)
        if not any(root != Path(root.anchor) and base_directory.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{str(directory / ADAPTER_FILE)!r} names the base model {base!r}, which is outside of {roots[0]} and "
                f"{roots[1]}; if you mean that model set model.model_name_or_path: {base}, or merge the adapter first"
            )
    return base, replace(config, trust_remote_code=False)


def moved_base(directory: Path, base: Path) -> Path:
    """Return where a base that is no longer at its recorded path is after its whole run was moved, or that path.

    The policy and the reward of a run are trained over its `sft`, or over a `base` inside their own folder.
    """
    candidates = {"sft": directory.parent / "sft", "base": directory / "base"}
    moved = candidates.get(base.name, base)
    return moved if (moved / "config.json").is_file() else base
