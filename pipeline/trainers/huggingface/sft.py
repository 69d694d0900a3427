"""Supervised fine-tuning: Relay's data and defaults for TRL's `SFTTrainer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig

from pipeline.models.adapters import adapter_config, check_adapter, fuse_adapter
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.loading import position_limit
from pipeline.models.prompt_lengths import check_token_ids, decoder_room
from pipeline.models.speech import reads_sound
from pipeline.runtime.devices import has_accelerator
from pipeline.runtime.distributed import launched_engine
from pipeline.runtime.messages import say
from pipeline.trainers.huggingface.arguments import complete_arguments, decide_ddp_search
from pipeline.trainers.huggingface.completion_head import CompletionHeadSFTTrainer, ResumableSFTTrainer
from pipeline.trainers.huggingface.encoder_decoder import (
    EncoderDecoderCollator,
    EncoderDecoderSFTTrainer,
    SpeechCollator,
    SpeechSFTTrainer,
)
from pipeline.trainers.huggingface.sft_data import RowPlaces, row_numbers, sft_dataset, truncate_examples
from pipeline.trainers.logs import MetricsFileCallback

DEFAULTS: Mapping[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "save_total_limit": 2,  # one to fall back on when the newest turns out damaged
    "report_to": "none",
    "include_num_input_tokens_seen": "non_padding",
}


def sft_arguments(arguments: Mapping[str, Any], output_dir: Path, seed: int) -> SFTConfig:
    """Build TRL's `SFTConfig` from the `sft:` section, with defaults that work on this machine.

    Evaluation and saving happen once an epoch unless the section says otherwise.

    Raises:
        ValueError: as `complete_arguments`.
    """
    settings = complete_arguments("sft", DEFAULTS, arguments)
    chosen = any(name.startswith(("gradient_checkpointing", "activation_checkpointing")) for name in arguments)
    if trains_on_one_accelerator() and not chosen:
        settings["gradient_checkpointing"] = False  # the trainer turns it on where memory runs out; TRL always does
    return SFTConfig(
        **settings,
        output_dir=str(output_dir / "checkpoints"),
        seed=seed,
        use_cpu=not has_accelerator(),
    )


def trains_on_one_accelerator() -> bool:
    """Tell whether one process trains on the only accelerator of this machine."""
    alone = PartialState().num_processes == 1 and launched_engine() is None
    return has_accelerator() and torch.accelerator.device_count() == 1 and alone


def build_sft_trainer(
    model: PreTrainedModel,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset,
    peft_config: LoraConfig | None,
    metrics_file: Path,
    where: RowPlaces = row_numbers,
) -> ResumableSFTTrainer:
    """Build TRL's trainer over tokenised splits; every log event is also a line of `metrics_file`.

    `where` says where rows of a split are in the data.

    Raises:
        ValueError: `sft.max_length` leaves no example, or the adapter does not fit the model.
    """
    args.max_length = _max_length(model, args)
    _leave_out_router_loss(model, args)
    _join_micro_batches(model, args)
    train_examples, validation_examples = _prepare_splits(model, args, tokenizer, train, validation, where)
    if args.padding_free and not args.packing:
        args.max_length = None  # the examples are cut, and TRL refuses to cut them without padding
    decide_ddp_search(args, model.config)
    if peft_config is not None:
        set_seed(args.seed)  # TRL draws the adapter before transformers sets the seed
    trainer = trainer_class(model, args)(
        model=model,
        args=args,
        processing_class=tokenizer,
        data_collator=_collator(model, tokenizer),
        train_dataset=train_examples,
        eval_dataset=validation_examples,
        peft_config=None if peft_config is None else adapter_config(model, peft_config),
        callbacks=[MetricsFileCallback(metrics_file)],
    )
    if isinstance(trainer.model, PeftModel):
        check_adapter(trainer.model)
        _widen_trained_weights(trainer.model)
        fuse_adapter(trainer.model)
    return trainer


def _widen_trained_weights(network: PeftModel) -> None:
    """Put what trains over 4 bits back into float32: TRL casts it to bfloat16, where small steps are rounded away."""
    if "quantization_config" in network.get_base_model().config.to_dict():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()


def _collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DataCollator | None:
    """Choose what makes a batch of examples; None: TRL's own."""
    if reads_sound(model.config):
        return SpeechCollator(tokenizer.pad_token_id)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCollator(decoder_prefix(model), tokenizer.pad_token_id)
    return None


def trainer_class(model: PreTrainedModel, args: SFTConfig) -> type[ResumableSFTTrainer]:
    """Choose the trainer that runs the LM head on scored tokens alone, for this model and this machine."""
    if reads_sound(model.config):
        return SpeechSFTTrainer
    if model.config.is_encoder_decoder:
        return EncoderDecoderSFTTrainer
    has_triton = torch.cuda.is_available() or torch.xpu.is_available()
    if _has_router(model) or args.loss_type != "nll":  # only TRL computes these losses
        return ResumableSFTTrainer
    # With Triton TRL's own LM head skips the tokens without loss; but it smooths labels in the evaluation too.
    if has_triton and not args.label_smoothing_factor:
        return ResumableSFTTrainer
    return CompletionHeadSFTTrainer


def _has_router(model: PreTrainedModel) -> bool:
    return "output_router_logits" in model.config.get_text_config().to_dict()


def _leave_out_router_loss(model: PreTrainedModel, args: SFTConfig) -> None:
    """Train a mixture of experts without the loss of its router where TRL cannot compute it."""
    config = model.config.get_text_config()
    if _has_router(model) and "num_experts" not in {*config.to_dict(), *config.attribute_map}:
        args.router_aux_loss_coef = 0.0
        say(f"sft: no loss of the router: TRL does not know how many experts a {model.config.model_type!r} has")


def _join_micro_batches(model: PreTrainedModel, args: SFTConfig) -> None:
    """On one accelerator, begin with the examples of a whole optimizer step in a pass; memory may make it smaller.

    Not where a pass has one row, which cannot be halved, and not where the gradient would change: the loss of a router
    is a mean over a pass, and noise on embeddings depends on its longest row.
    """
    changes = args.padding_free or args.packing or args.neftune_noise_alpha or _has_router(model)
    if args.gradient_accumulation_steps == 1 or changes or not trains_on_one_accelerator():
        return
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    say(f"sft: passes of {args.per_device_train_batch_size} examples, half as many wherever memory runs out")


def _max_length(model: PreTrainedModel, args: SFTConfig) -> int | None:
    """Return `sft.max_length`, at most what the model can read: TRL's default ignores that."""
    limit = decoder_room(model.config) if reads_sound(model.config) else position_limit(model.config)
    if limit is not None and model.config.is_encoder_decoder and not reads_sound(model.config):
        limit -= len(decoder_prefix(model)) - 1  # the decoder reads these, then all tokens but the last
    return min([length for length in (args.max_length, limit) if length is not None], default=None)


def _prepare_splits(
    model: PreTrainedModel,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset,
    where: RowPlaces,
) -> tuple[Dataset, Dataset | None]:
    """Tokenise the splits and cut their examples, but not those that packing splits where they are too long."""

    embeddings = model.get_input_embeddings().num_embeddings  # weights that are sharded have no shape of their own

    def prepare(split: Dataset, packs: bool, name: str) -> Dataset:
        examples = sft_dataset(
            tokenizer,
            split,
            completion_only_loss=args.completion_only_loss is not False,
            encoder_decoder=model.config.is_encoder_decoder,
            num_proc=args.dataset_num_proc,
        )
        for column in ("input_ids", "labels"):
            check_token_ids(examples[column], embeddings, f"examples of {name}")
        splits = packs and args.packing_strategy != "bfd"
        return truncate_examples(examples, None if splits else args.max_length, name, args.dataset_num_proc, where)

    train_examples = prepare(train, args.packing, "train")
    if args.eval_strategy == "no":
        return train_examples, None
    packs_validation = args.packing if args.eval_packing is None else args.eval_packing
    return train_examples, prepare(validation, packs_validation, "validation")


def training_figures(trainer: ResumableSFTTrainer, result: TrainOutput) -> dict[str, object]:
    """Return what stage.json holds of the training."""
    return {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "best_eval_loss": trainer.state.best_metric,
        "mixed_precision": trainer.accelerator.mixed_precision,  # the machine's choice, where the recipe makes none
    }
