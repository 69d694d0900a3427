"""LoRA adapters: which weights they add to, where they may not sit, and how they are saved and loaded."""

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.hub import unreadable
from pipeline.models.kernels.fused_layers import fuse_layers
from pipeline.models.speech import reads_sound
from pipeline.models.weights import shown_weights

DECODER_LINEAR, ALL_LINEAR = "decoder-linear", "all-linear"  # of lora_target_modules; peft has the second alone
# peft takes layers of these names for experts, and adapts the tensor of all experts in their stead.
EXPERT_LAYERS = ("gate", "shared_expert_gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def adapter_config(model: PreTrainedModel, lora: LoraConfig) -> LoraConfig:
    """Fit `lora` to this model: its kind of task, and `decoder-linear` as the decoder's dense layers by name.

    Of a mixture of experts `all-linear` is what has other names than layers of experts: above all the attention.

    Raises:
        ValueError: `decoder-linear` and a causal model.
    """
    targets, is_encoder_decoder = lora.target_modules, model.config.is_encoder_decoder
    if targets == DECODER_LINEAR:
        if not is_encoder_decoder:
            raise ValueError(
                f"model.lora_target_modules: {DECODER_LINEAR!r} is for encoder-decoders, and this "
                f"{model.config.model_type} has no encoder; use all-linear"
            )
        inside = set(model.get_decoder().modules())
        targets = [n for n, m in model.named_modules() if m in inside and isinstance(m, nn.Linear)]
    elif targets == ALL_LINEAR and fused_experts(model):
        head = model.get_output_embeddings()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        targets = [name for name in linear if name.rpartition(".")[2] not in EXPERT_LAYERS]
    task_type = "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    if reads_sound(model.config):  # peft's own kinds pass on `input_ids`, which such a model does not have
        task_type = None
    return replace(lora, task_type=task_type, target_modules=targets)


def fused_experts(model: PreTrainedModel) -> list[str]:
    """Return the modules of a mixture of experts whose experts are one tensor instead of a dense layer each.

    peft adapts such a tensor without dropout only, and by weights for each expert; `all-linear` leaves it out.
    """
    modules = [(name, module) for name, module in model.named_modules() if name.endswith("experts")]
    return [name for name, module in modules if any(p.dim() == 3 for p in module.parameters(recurse=False))]


def check_targets(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuse names of layers that peft cannot adapt; `model` has no weights, and is changed.

    Raises:
        ValueError: naming the keys and what to do.
    """
    experts = fused_experts(model)
    try:
        fitted = adapter_config(model, replace(lora, use_dora=False))  # which computes with weights
        check_adapter(get_peft_model(model, fitted, low_cpu_mem_usage=True))
    except ValueError as error:
        if str(error).startswith("model."):
            raise
        advice = f"name other layers of it, or {ALL_LINEAR}"
        if experts:
            advice = "to train experts name all their layers and set model.lora_dropout: 0, or leave them out with "
            advice += ALL_LINEAR
        raise ValueError(
            f"model.lora_target_modules: peft cannot adapt these layers of this {model.config.model_type} "
            f"({' '.join(str(error).split())[:200].rstrip('.')}); {advice}"
        ) from error


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter on an embedding that is also the LM head, or the other side's embedding.

    The adapter changes one of the two uses; merged into the shared weights it changes both, so the saved policy would
    not be the one that was trained.

    Raises:
        ValueError: naming the module and what to do.
    """
    if name := _adapter_on_shared_weights(model):
        raise ValueError(
            f"model.lora_target_modules: {name!r} of this {model.config.model_type} shares "
            "its weights between input embedding and LM head (tie_word_embeddings), so that an adapter on it "
            "cannot be merged; leave it out, or train a copy of it with lora_modules_to_save"
        )


def fuse_adapter(model: PeftModel) -> None:
    """Let the adapter's layers compute in few kernels on a GPU."""
    fuse_layers(model)


def _adapter_on_shared_weights(model: PeftModel) -> str | None:
    """Return the name of a module with an adapter of its own on weights that another module uses too, or None."""
    network = model.get_base_model()
    users: dict[int, list[str]] = {}
    for name, module in network.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, nn.Embedding | nn.Linear) or name.endswith((".base_layer", ".original_module")):
            continue
        # Of single tokens that are trained alike on both sides peft makes one adapter, which the other side follows.
        if not isinstance(module, TrainableTokensLayer) or module.tied_adapter is None:
            users.setdefault(id(base.weight), []).append(name)
    adapters = {name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    for names in users.values():
        if len(names) > 1 and (shared := adapters.intersection(names)):
            return min(shared).removesuffix(".token_adapter").rpartition(".")[2]
    return None


def attach_adapter(model: PreTrainedModel, directory: str | Path) -> PeftModel:
    """Put a saved adapter on its base, whose embeddings get the size of the adapter's vocabulary.

    Raises:
        ValueError: the adapter lacks weights, or was trained on another base.
    """
    directory = os.path.expanduser(directory)
    try:
        config, weights = PeftConfig.from_pretrained(directory), load_peft_weights(directory, device="cpu")
        if problem := resize_embeddings(model, config, weights):
            raise ValueError(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of what is refused here, and torch of empty tensors
            network = PeftModel.from_pretrained(model, directory)
            result = network.load_adapter(directory, "default")  # once more, for the names that do not fit
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise unreadable(directory, "adapter weights", "adapter files", error) from error
    except KeyError as error:  # of modules that are saved whole
        raise _misfit(model, directory, f"it lacks {error.args[0]}") from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise _misfit(model, directory, " ".join(str(error).split())[:300]) from error
    if name := _adapter_on_shared_weights(network):
        reason = f"{name} shares its weights between input embedding and LM head"
        raise ValueError(
            f"the adapter {directory!r} does not merge ({reason}); train a copy of it (modules_to_save) instead"
        )
    unexpected = [name for name in result.unexpected_keys if "lora_" in name]  # peft may save an embedding twice
    check_loaded_adapter(model, directory, result.missing_keys, unexpected)
    return network


def check_loaded_adapter(
    model: PreTrainedModel, directory: object, missing: Sequence[str], unexpected: Sequence[str]
) -> None:
    """Refuse an adapter that lacks weights, which would be random, or has some that the base has no module for.

    Raises:
        ValueError: naming the first of the weights.
    """
    if missing:
        raise _misfit(model, directory, f"it lacks {shown_weights(sorted(missing))}")
    if unexpected:
        raise _misfit(model, directory, f"the base has nothing for {shown_weights(sorted(unexpected))}")


def _misfit(model: PreTrainedModel, directory: object, reason: str) -> ValueError:
    return ValueError(
        f"the adapter {str(directory)!r} does not fit its base {model.config.name_or_path!r} ({reason}); give the "
        "base that it was trained on, or merge the adapter first"
    )


def resize_embeddings(model: PreTrainedModel, config: PeftConfig, weights: dict[str, Tensor]) -> str | None:
    """Give the embeddings the rows that an adapter was trained with, where tokens had been added before.

    Returns:
        Which rows neither the base nor the adapter has weights for, if there are some.
    """
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is inputs.weight
    names = {id(module): name for name, module in model.named_modules()}
    rows, size = inputs.weight.shape[0], _saved_rows(weights, names[id(inputs)])
    if size is not None and size != rows:
        if size > rows and not tied and _saved_rows(weights, names[id(head)]) is None:
            return f"it has {size} embeddings, the base {rows}, and it brings no LM head"
        model.resize_token_embeddings(size, mean_resizing=False)
        return None
    trained = config.to_dict().get("trainable_token_indices") or ()
    indices = {index for item in (trained.values() if isinstance(trained, dict) else [trained]) for index in item}
    size = max(indices, default=-1) + 1
    if size > rows:
        heads = isinstance(trained, dict) and any(names[id(head)].endswith(name) for name in trained) if head else True
        has_all = indices.issuperset(range(rows, size))
        if not has_all or not (tied or heads):
            lacks = "no LM head for them" if has_all else "not all in between"
            return f"it trained tokens up to {size - 1}, the base has {rows} embeddings, and it brings {lacks}"
        model.resize_token_embeddings(size, mean_resizing=False)
    return None


def _saved_rows(weights: dict[str, Tensor], module: str) -> int | None:
    """Return how many rows an embedding or LM head has in an adapter's files; None where they do not hold it."""
    for name in (f"base_model.model.{module}.weight", f"base_model.model.{module}.base_layer.weight"):
        if name in weights:
            return len(weights[name])
    return None


def save_adapter(
    network: PeftModel,
    directory: Path,
    names: Sequence[str] = ("default",),
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Save adapters; a base in a directory is recorded by its absolute path, so that they load from any folder.

    `weights`: whole ones by name, where the network holds slices of them.
    """
    for name in names:
        config = network.peft_config[name]
        if config.base_model_name_or_path and Path(config.base_model_name_or_path).expanduser().is_dir():
            config.base_model_name_or_path = os.path.abspath(os.path.expanduser(config.base_model_name_or_path))
        network.save_pretrained(directory, selected_adapters=[name], state_dict=weights)
