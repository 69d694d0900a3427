"""Reward modelling: Relay's data, model and defaults for TRL's `RewardTrainer`."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from pipeline.models.dropout import remove_dropout
from pipeline.models.reward_model import RewardNetwork, load_head
from pipeline.models.sequences import make_sequences
from pipeline.models.sharding import Sharding, shards_models
from pipeline.models.slices import keep_whole_states, like
from pipeline.models.text import encode_prompts
from pipeline.rewards.pairs import CHOICE, HELD_OUT, TRAIN, Pair
from pipeline.runtime.devices import has_accelerator
from pipeline.runtime.distributed import without_engine
from pipeline.trainers.huggingface.arguments import complete_arguments, decide_ddp_search
from pipeline.trainers.huggingface.resumable import ResumableTrainer
from pipeline.trainers.logs import MetricsFileCallback

DEFAULTS: Mapping[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "save_total_limit": 2,  # one to fall back on when the newest turns out damaged
    "report_to": "none",
}


def reward_arguments(arguments: Mapping[str, Any], output_dir: Path, seed: int) -> RewardConfig:
    """Build TRL's `RewardConfig` from the `reward:` section, with defaults that work on this machine.

    Raises:
        ValueError: as `complete_arguments`.
    """
    settings = complete_arguments("reward", DEFAULTS, arguments)
    # Relay's collator reads the columns, and pairs that are too long were counted and dropped before.
    return RewardConfig(
        **{**settings, "remove_unused_columns": False, "max_length": None, "prediction_loss_only": True},
        output_dir=str(output_dir / "checkpoints"),
        seed=seed,
        use_cpu=not has_accelerator(),
    )


def pair_dataset(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], encoder_decoder: bool) -> Dataset:
    """Tokenise each pair into `prompt_ids`, `chosen_ids` and `rejected_ids`; TRL leaves such columns as they are."""
    columns: dict[str, list] = {
        "prompt_ids": encode_prompts(tokenizer, [pair.prompt for pair in pairs], encoder_decoder),
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
    }
    columns["length"] = [
        len(p) + max(len(c), len(r))
        for p, c, r in zip(columns["prompt_ids"], columns["chosen_ids"], columns["rejected_ids"], strict=True)
    ]
    if all(pair.margin is not None for pair in pairs):
        columns["margin"] = [pair.margin for pair in pairs]
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class PairCollator:
    """Pads B rows of `pair_dataset` into 2B sequences, the chosen ones first, as TRL's loss expects."""

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `prompt_ids, prompt_mask [2B, P]`, `completion_ids, completion_mask [2B, C]` and `margin [B]`."""
        prompts = [row["prompt_ids"] for row in rows] * 2
        completions = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        sequences = make_sequences(prompts, completions, self.pad_id)
        batch = {name: tensor for name, tensor in vars(sequences).items() if tensor is not None}
        # TRL counts the tokens of this mask.
        batch["attention_mask"] = torch.cat([sequences.prompt_mask, sequences.completion_mask], 1).long()
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([row["margin"] for row in rows])
        return batch


class ResumableRewardTrainer(ResumableTrainer, RewardTrainer):
    """TRL's reward trainer with exact resume, whose checkpoints hold only the adapter and the head."""

    section = "reward"

    def __init__(self, *args, **kwargs) -> None:
        self._shards = shards_models()  # the block below says no
        with without_engine():  # the network is sharded as PPO's is, not by accelerate
            super().__init__(*args, **kwargs)
        self.sharding, self.is_distributed_loading_by_transformers = Sharding(), self._shards

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._shards:  # else a slice of it is moved, when the training begins
            super()._move_model_to_device(model, device)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Create it over slices of the network, where accelerate launch asks for FSDP2."""
        if self.is_distributed_loading_by_transformers and not self.sharding.roots:
            self.sharding.place(self.model, ("scores",))
            keep_whole_states(super().create_optimizer(*args, **kwargs))
        return super().create_optimizer(*args, **kwargs)

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager:
        return nullcontext()  # each micro-batch adds to the slices of the gradient

    def _saved_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _save_optimizer_and_scheduler(self, output_dir: str | None) -> None:
        if self.sharding.roots and not self.args.should_save:
            self.optimizer.state_dict()  # the process that saves gathers slices of all
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        save_network(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))


def save_network(network: RewardNetwork, directory: Path) -> None:
    """Save the adapter and the head; every process calls it, the main one writes."""
    weights = network.trainable_state() if isinstance(network, FSDPModule) else None
    if PartialState().is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        network.save_pretrained(directory, weights)


def load_weights(network: RewardNetwork, directory: Path) -> None:
    """Load a saved adapter and head into a network that has the same adapter, whole or as slices."""
    weights = load_peft_weights(str(directory), device="cpu")
    if isinstance(network, FSDPModule):
        here = get_peft_model_state_dict(network.network, save_embedding_layers=False)
        weights = {name: like(weight, here[name]) if name in here else weight for name, weight in weights.items()}
    set_peft_model_state_dict(network.network, weights)
    with torch.no_grad():
        network.head.weight.copy_(like(load_head(directory).weight, network.head.weight))


def build_reward_trainer(
    model: PreTrainedModel,
    args: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    lora: LoraConfig,
    metrics_file: Path,
) -> ResumableRewardTrainer:
    """Build TRL's trainer over the pairs; every log event is also a line of `metrics_file`.

    Its evaluations are on the pairs that choose the checkpoint; on all held-out pairs where nothing is chosen.
    """
    set_seed(args.seed)  # it draws the adapter and the head
    network = RewardNetwork.create(model, lora)
    if args.disable_dropout:
        remove_dropout(network)  # TRL's own switch finds torch's dropout modules only
    decide_ddp_search(args, model.config)
    evaluated = CHOICE if any(pair.split == CHOICE for pair in pairs) else HELD_OUT
    datasets = {
        split: pair_dataset(tokenizer, [p for p in pairs if p.split == split], model.config.is_encoder_decoder)
        for split in (TRAIN, evaluated)
    }
    return ResumableRewardTrainer(
        model=network,
        args=args,
        processing_class=tokenizer,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=datasets[TRAIN],
        eval_dataset=datasets[evaluated] if args.eval_strategy != "no" else None,
        callbacks=[MetricsFileCallback(metrics_file)],
    )
