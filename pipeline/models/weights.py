"""Whether weight files hold every weight of a model: read from their headers, so that no model has to be loaded."""

import json
import os
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from pipeline.models.hub import unreadable

FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # in transformers' order
SHOWN_WEIGHTS = 3


def empty_model(auto_class: type, path: str, config: PretrainedConfig, revision: str = "main") -> PreTrainedModel:
    """Build a model without memory for its weights (torch's meta device), and check its weight files against it.

    Files that are not here yet (a Hub model that is not in the local cache) and weights in a quantised form are
    checked when they are loaded.

    Raises:
        ValueError: weights that the files lack or have in another shape, no weight file, or one that is broken; a
            model of another kind.
    """
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):  # followed by all that there are
            raise
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise ValueError(
            f"{path!r} is a {', '.join(config.architectures or [config.model_type])}, and transformers has no {kind} "
            f"of the type {config.model_type}; give another model"
        ) from error
    files = weight_files(path, revision)
    if not files or "quantization_config" in config.to_dict():
        return model
    with _quiet_transformers():  # it also warns of what is refused here in one sentence
        model, info = type(model).from_pretrained(
            None,
            config=config,
            state_dict=read_headers(path, files),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.config.name_or_path = path
    check_loaded_weights(model, path, info)
    return model


def check_loaded_weights(model: PreTrainedModel, path: object, info: Mapping[str, Collection]) -> None:
    """Refuse a model of which some weights were not in its files: transformers draws those at random.

    `info` is what `from_pretrained` returns with `output_loading_info`; tied weights are not missing in it.

    Raises:
        ValueError: naming the directory and the first of the weights.
    """
    kind = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{str(path)!r} is no complete {kind}: its weight files lack {shown_weights(missing)}, which would be "
            "random, and others at every load; give a checkpoint that was saved with these weights"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [f"{name} ({list(saved)} instead of {list(expected)})" for name, saved, expected in mismatched]
        raise ValueError(
            f"the weight files of {str(path)!r} do not fit its config.json: the {kind} has other shapes than "
            f"{shown_weights(shapes)}; mend config.json, or give another model"
        )


def shown_weights(names: list[str]) -> str:
    """Name the first weights, and how many more there are."""
    more = f" and {len(names) - SHOWN_WEIGHTS} more" if len(names) > SHOWN_WEIGHTS else ""
    return f"{', '.join(names[:SHOWN_WEIGHTS])}{more}"


def weight_files(path: str, revision: str = "main") -> list[Path]:
    """List the weight files of a directory or of a Hub model in the local cache; none where the cache has none.

    Raises:
        ValueError: a directory without weight files, or without one that its index names.
    """
    directory = Path(os.path.expanduser(path))
    for name in FILES:
        file = directory / name if directory.is_dir() else try_to_load_from_cache(path, name, revision=revision)
        if not isinstance(file, str | Path) or not Path(file).is_file():
            continue
        if not name.endswith(".index.json"):
            return [Path(file)]
        try:
            shards = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(path, "list of weight files", name, error) from error
        files = [Path(file).parent / shard for shard in shards]
        absent = [shard.name for shard in files if not shard.is_file()]
        if absent and directory.is_dir():
            raise ValueError(f"{path!r} lacks the weight files {shown_weights(absent)}; copy the whole directory")
        return [] if absent else files
    if directory.is_dir():
        raise ValueError(f"{path!r} holds no weight files ({', '.join(FILES)}); give a model that was saved whole")
    return []


def mapped_weights(path: str, dtype: torch.dtype | str, revision: str = "main") -> dict[str, Tensor] | None:
    """Map weight files into memory: the processes of a machine then share what they read, until they change it.

    None where that is not possible: files of another kind, not on this machine, or with numbers of another type.
    """
    files = weight_files(path, revision)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    return weights if all(weight.dtype == dtype for weight in weights.values()) else None


def read_headers(path: object, files: list[Path]) -> dict[str, Tensor]:
    """Read names, shapes and dtypes of the weights as empty tensors on torch's meta device.

    Raises:
        ValueError: a file is broken, or would run code.
    """
    weights: dict[str, Tensor] = {}
    try:
        for file in files:
            if file.suffix != ".safetensors":
                weights |= torch.load(file, map_location="meta", weights_only=True)
                continue
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118  # it is no mapping
                    weights[name] = torch.empty(content.get_slice(name).get_shape(), device="meta")
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise unreadable(path, "weights", "weight files", error) from error
    return weights


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide warnings and progress bars of transformers until the block ends."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
