"""Supervised fine-tuning: Relay's data and defaults for TRL's `SFTTrainer`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from pipeline.models.adapters import adapter_config, check_adapter
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.loading import position_limit
from pipeline.trainers.checkpoints import newest_checkpoint
from pipeline.trainers.huggingface.arguments import complete_arguments
from pipeline.trainers.huggingface.completion_head import CompletionHeadSFTTrainer, ResumableSFTTrainer
from pipeline.trainers.huggingface.encoder_decoder import EncoderDecoderCollator, EncoderDecoderSFTTrainer
from pipeline.trainers.huggingface.sft_data import sft_dataset, truncate_examples
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
    return SFTConfig(
        **complete_arguments("sft", DEFAULTS, arguments),
        output_dir=str(output_dir / "checkpoints"),
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
    )


def build_sft_trainer(
    model: PreTrainedModel,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset,
    peft_config: LoraConfig | None,
    metrics_file: Path,
) -> ResumableSFTTrainer:
    """Build TRL's trainer over tokenised splits; every log event is also a line of `metrics_file`.

    Raises:
        ValueError: `sft.max_length` leaves no example, or the adapter does not fit the model.
    """
    limit = position_limit(model.config)
    if limit is not None and (args.max_length is None or args.max_length > limit):
        args.max_length = limit  # TRL's default ignores the model's own limit
    packs_validation = args.packing if args.eval_packing is None else args.eval_packing
    train_examples = _prepare(tokenizer, train, args, model, args.packing, "train")
    validation_examples = None
    if args.eval_strategy != "no":
        validation_examples = _prepare(tokenizer, validation, args, model, packs_validation, "validation")
    if args.padding_free and not args.packing:
        args.max_length = None  # the examples are cut, and TRL refuses to cut them without padding
    if peft_config is not None:
        set_seed(args.seed)  # TRL draws the adapter before transformers sets the seed
    is_encoder_decoder = model.config.is_encoder_decoder
    trainer = trainer_class(model, args)(
        model=model,
        args=args,
        processing_class=tokenizer,
        data_collator=(
            EncoderDecoderCollator(decoder_prefix(model), tokenizer.pad_token_id) if is_encoder_decoder else None
        ),
        train_dataset=train_examples,
        eval_dataset=validation_examples,
        peft_config=None if peft_config is None else adapter_config(model, peft_config),
        callbacks=[MetricsFileCallback(metrics_file)],
    )
    if isinstance(trainer.model, PeftModel):
        check_adapter(trainer.model)
    return trainer


def trainer_class(model: PreTrainedModel, args: SFTConfig) -> type[ResumableSFTTrainer]:
    """Choose the trainer that runs the LM head on scored tokens alone, for this model and this machine."""
    if model.config.is_encoder_decoder:
        return EncoderDecoderSFTTrainer
    has_triton = torch.cuda.is_available() or torch.xpu.is_available()
    has_router = "output_router_logits" in model.config.get_text_config().to_dict()
    # With Triton TRL's own LM head skips the tokens without loss; only TRL computes these losses.
    if has_triton or has_router or args.loss_type != "nll":
        return ResumableSFTTrainer
    return CompletionHeadSFTTrainer


def _prepare(
    tokenizer: PreTrainedTokenizerBase, split: Dataset, args: SFTConfig, model: PreTrainedModel, packs: bool, name: str
) -> Dataset:
    """Tokenise a split and cut its examples, unless they are packed: packing splits what is too long."""
    examples = sft_dataset(
        tokenizer,
        split,
        completion_only_loss=args.completion_only_loss is not False,
        encoder_decoder=model.config.is_encoder_decoder,
        num_proc=args.dataset_num_proc,
    )
    return truncate_examples(examples, None if packs else args.max_length, name, args.dataset_num_proc)


def last_checkpoint(args: SFTConfig) -> str | None:
    """Find the newest intact checkpoint of an interrupted run; damaged ones are named on stderr.

    Raises:
        ValueError: files are missing from a checkpoint, or all checkpoints are damaged.
    """
    checkpoint, notes = newest_checkpoint(Path(args.output_dir))
    if PartialState().is_main_process:
        for note in [*notes, *([f"continuing from {checkpoint}"] if checkpoint else [])]:
            print(note, file=sys.stderr)
    return str(checkpoint) if checkpoint else None
