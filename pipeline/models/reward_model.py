"""The reward model: an adapter and a scalar head on the base that PPO shares, and the record that goes with it."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from pipeline.models.adapters import adapter_config, attach_adapter, check_adapter, fuse_adapter, save_adapter
from pipeline.models.hub import ADAPTER_FILE
from pipeline.models.sequences import Sequences
from pipeline.models.slices import whole_on_main
from pipeline.models.states import final_states
from pipeline.models.weights import read_headers

HEAD_FILE, RECORD_FILE = "reward_head.safetensors", "reward_model.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROBE_VALUES = 1024  # about as many numbers of each weight decide whether two bases are the same


@dataclass(frozen=True)
class RewardRecord:
    """What goes with a reward model: `score = (raw - shift) / scale`, and how it was evaluated.

    `kind` is `adapter` (over the base with these digests) or `classifier` (at `path`, with its own tokenizer, and a
    `template` where it needs one). `accuracy` is the share of `held_out_pairs` whose chosen text scores higher, and
    `accuracy_low` where its 95 % interval begins.
    """

    kind: str
    path: str
    shift: float
    scale: float
    accuracy: float | None
    held_out_pairs: int
    base_digest: str | None = None
    tokenizer_digest: str | None = None
    template: str | None = None
    accuracy_low: float | None = None

    def save(self, directory: Path) -> None:
        """Write `reward_model.json`."""
        (directory / RECORD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def load_record(directory: str | Path) -> RewardRecord:
    """The record in the folder of a reward stage.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    file = Path(directory).expanduser() / RECORD_FILE
    try:
        return RewardRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"ppo.reward_model_path: {str(directory)!r} holds no finished reward model ({RECORD_FILE} is missing or "
            "broken); give the reward folder of a run whose reward stage has finished"
        ) from error


def apply_head(head: nn.Linear, states: Tensor) -> Tensor:
    """Raw scores [B] of `states [B, H]`, in the head's own precision whatever autocast does to the trunk."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).squeeze(-1)


class RewardNetwork(nn.Module):
    """A language model with a LoRA adapter and a scalar head, as TRL's `RewardTrainer` wants it."""

    def __init__(self, network: PeftModel, head: nn.Linear) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.config = copy.deepcopy(self.language_model.config)
        self.config.num_labels = 1

    @classmethod
    def create(cls, model: PreTrainedModel, lora: LoraConfig) -> "RewardNetwork":
        """Put a fresh adapter and head on a language model.

        Raises:
            ValueError: an adapter on weights that the model uses twice.
        """
        width = model.get_output_embeddings().weight.shape[1]
        network = get_peft_model(model, adapter_config(model, lora))
        check_adapter(network)
        head = nn.Linear(width, 1, bias=False, dtype=torch.float32)  # a bias would cancel out of every pair
        nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
        fuse_adapter(network)
        return cls(network, head)

    @classmethod
    def load(cls, model: PreTrainedModel, directory: str | Path) -> "RewardNetwork":
        """The saved adapter and head over `model`, which they were trained on."""
        return cls(attach_adapter(model, directory), load_head(directory))

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model, with the adapter's layers inside it."""
        return self.network.get_base_model()

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        **unused: object,
    ) -> SequenceClassifierOutput:
        """`logits [B, 1]`; TRL also passes what only its loss reads."""
        sequences = Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask)
        return SequenceClassifierOutput(logits=apply_head(self.head, self._states(sequences)).unsqueeze(-1))

    def _states(self, sequences: Sequences) -> Tensor:
        return final_states(self.language_model, sequences)

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Tensor:
        """Raw scores [B]."""
        return apply_head(self.head, self._states(sequences))

    def add_model_tags(self, tags: object) -> None:
        """Nothing: tags are for uploads, which training never makes."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping | None = None, **more: Any) -> None:
        """Recompute layers in the backward pass, as the language model does it."""
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.language_model.gradient_checkpointing_enable(settings, **more)

    def save_pretrained(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """The adapter as peft saves it, and the head beside it.

        `weights`: those of `trainable_state`, where this process holds slices of them.
        """
        start, head = "network.", self.head.weight if weights is None else weights["head.weight"]
        if weights is not None:
            weights = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        save_adapter(self.network, directory, weights=weights)
        save_file({"weight": head.detach().cpu().contiguous()}, Path(directory) / HEAD_FILE)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy everything that is trained to the CPU, by name; the main process alone gets what is sharded."""
        return {name: whole_on_main(p) for name, p in self.named_parameters() if p.requires_grad}


def check_reward_files(directory: str | Path, model: PreTrainedModel | None) -> None:
    """Refuse the folder of a reward adapter that is not whole, or is of a model of another width; no weight is read.

    `model` is the base, with or without weights, where it is known.

    Raises:
        ValueError: naming the file that is missing or broken.
    """
    folder = Path(directory).expanduser()
    absent = [name for name in (HEAD_FILE, ADAPTER_FILE, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"ppo.reward_model_path: {str(directory)!r} is no whole reward model: {', '.join(absent)} is missing; "
            "copy the whole reward folder of its run, or train it again"
        )
    try:
        head = read_headers(directory, [folder / HEAD_FILE])
    except ValueError as error:
        raise ValueError(f"ppo.reward_model_path: {error}") from error
    if head.keys() != {"weight"} or head["weight"].dim() != 2 or len(head["weight"]) != 1:
        raise ValueError(
            f"ppo.reward_model_path: {HEAD_FILE} in {str(directory)!r} is no head with one output; copy the reward "
            "folder of its run anew, or train it again"
        )
    width = None if model is None else model.get_output_embeddings().weight.shape[1]
    if width is not None and head["weight"].shape[1] != width:
        raise ValueError(
            f"ppo.reward_model_path: the head in {str(directory)!r} reads states of {head['weight'].shape[1]} "
            f"numbers, and those of the model that PPO starts from have {width}: it was trained over another model"
        )


def load_head(directory: str | Path) -> nn.Linear:
    """The head that was saved beside an adapter.

    Raises:
        ValueError: as `check_reward_files`.
    """
    check_reward_files(directory, None)
    weight = load_file(Path(directory).expanduser() / HEAD_FILE)["weight"]
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head.requires_grad_(False)


def check_base(record: RewardRecord, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: object) -> None:
    """Refuse a reward adapter over a model or tokenizer that it was not trained on.

    Raises:
        ValueError: naming both.
    """
    for what, recorded, here in (
        ("model", record.base_digest, weights_digest(model)),
        ("tokenizer", record.tokenizer_digest, tokenizer_digest(tokenizer)),
    ):
        if recorded != here:
            raise ValueError(
                f"ppo.reward_model_path: the reward adapter was trained over the {what} of {record.path!r}, and PPO "
                f"starts from {str(base)!r}, whose {what} is another; train the reward on that one, or start PPO from "
                "the reward's"
            )


def weights_digest(model: PreTrainedModel) -> str:
    """A SHA-256 over names, shapes and evenly chosen numbers of every weight, as bfloat16 whatever their dtype."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // PROBE_VALUES)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + chosen.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 over vocabulary, special tokens and chat template."""
    special: Sequence[int | None] = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    content = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
