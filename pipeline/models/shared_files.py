"""What the shared model of a PPO run leaves: the policy as peft or transformers save it, with the value head."""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from pipeline.models.adapters import save_adapter
from pipeline.models.roles import POLICY, VALUE
from pipeline.models.shared import SharedModel
from pipeline.models.slices import whole_on_main


def save_shared(shared: SharedModel, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Save the policy as peft or transformers do, and the value head in the same directory.

    `weights`: the whole ones of `gather_shared_weights`, where this process holds slices of them.
    """
    network, head = (_below(weights, module) for module in ("network", "value_head"))
    if isinstance(shared.network, PeftModel):
        names = [POLICY, *([VALUE] if shared.has_value_adapter else [])]
        save_adapter(shared.network, directory, names, network)
    else:
        shared.network.save_pretrained(directory, state_dict=network)
    head = {name: tensor.contiguous() for name, tensor in (head or shared.value_head.state_dict()).items()}
    save_file(head, directory / "value_head.safetensors")


def gather_shared_weights(shared: SharedModel) -> dict[str, Tensor]:
    """Gather on the CPU of the main process what `save_shared` saves; every process calls it, and gives its slice."""
    embeddings = (shared.language_model.get_input_embeddings(), shared.language_model.get_output_embeddings())
    needed = {id(p) for module in (*embeddings, shared.value_head) for p in module.parameters()}
    needed |= {id(p) for p in shared.network.parameters() if p.requires_grad}
    gathered: dict[int, Tensor] = {}  # weights with two names stay one, as transformers expects of tied ones
    for _, weight in shared.named_parameters():
        if id(weight) in needed:
            gathered[id(weight)] = whole_on_main(weight)
    names = shared.named_parameters(remove_duplicate=False)
    return {name: gathered[id(weight)] for name, weight in names if id(weight) in needed}


def _below(weights: Mapping[str, Tensor] | None, module: str) -> dict[str, Tensor] | None:
    """Return the weights of a module under the names that they have in it."""
    start = f"{module}."
    if weights is None:
        return None
    return {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}
