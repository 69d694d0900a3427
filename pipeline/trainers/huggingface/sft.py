"""Supervised fine-tuning: Relay's data and defaults for TRL's `SFTTrainer`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pipeline.models.adapters import adapter_config, check_adapter
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.loading import position_limit
from pipeline.models.sequences import pad_right
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.trainers.checkpoints import newest_checkpoint
from pipeline.trainers.huggingface.resumable import ResumableTrainer
from pipeline.trainers.logs import MetricsFileCallback
from pipeline.trainers.precision import check_precision, native_bf16
from pipeline.trainers.trackers import installed
from pipeline.trainers.weights_alone import weights_alone

DEFAULTS: Mapping[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "save_total_limit": 2,  # one to fall back on when the newest turns out damaged
    "report_to": "none",
    "include_num_input_tokens_seen": "non_padding",
}


class ResumableSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer that resumes."""


def sft_arguments(arguments: Mapping[str, Any], output_dir: Path, seed: int) -> SFTConfig:
    """TRL's `SFTConfig` for the `sft:` section, with defaults that work on the machine at hand.

    TRL defaults to bf16 and refuses it on a machine without an accelerator; here bf16 is on where the machine has
    instructions for it, be it an accelerator or a CPU. Evaluation and saving happen once an epoch unless it says else.
    """
    return SFTConfig(
        **complete_arguments("sft", DEFAULTS, arguments),
        output_dir=str(output_dir / "checkpoints"),
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
    )


def complete_arguments(section: str, defaults: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of a config class of TRL over Relay's `defaults`, with the bf16 and the trackers that are here.

    Raises:
        ValueError: a precision that the machine does not have.
    """
    settings = {**defaults, **arguments}
    settings["report_to"] = installed(settings["report_to"]) or "none"
    if settings.get("bf16") is None and not settings.get("fp16"):
        settings["bf16"] = native_bf16()
    check_precision(section, settings.get("fp16"), settings.get("bf16"))
    if settings["eval_strategy"] == "no" and "load_best_model_at_end" not in arguments:
        settings["load_best_model_at_end"] = False
    settings.setdefault("disable_tqdm", False)  # transformers hides its bar where its log level is raised
    return settings


def sft_dataset(
    tokenizer: PreTrainedTokenizerBase,
    split: Dataset,
    completion_only_loss: bool = True,
    encoder_decoder: bool = False,
) -> Dataset:
    """`input_ids` and `labels` (-100 where no loss is taken) of each example, prompt rendered as PPO renders it.

    An encoder-decoder's `input_ids` are the prompt and its `labels` the completion.
    """
    prompts = encode_prompts(tokenizer, split["prompt"], encoder_decoder)
    completions = encode_completions(tokenizer, split["prompt"], split["completion"])
    pairs = list(zip(prompts, completions, strict=True))
    if encoder_decoder:
        columns = {"input_ids": prompts, "labels": completions}
    else:
        columns = {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "labels": [([-100] * len(p) if completion_only_loss else p) + c for p, c in pairs],
        }
    return Dataset.from_dict({**columns, "length": [len(prompt) + len(completion) for prompt, completion in pairs]})


def fit_examples(rows: Dataset, max_length: int | None, split: str) -> Dataset:
    """Leave out the rows of `sft_dataset` of which `max_length` tokens hold nothing to learn; what is cut is said.

    TRL cuts the others, `input_ids` and `labels` each, without a word.

    Raises:
        ValueError: no row is left.
    """
    if max_length is None:
        return rows
    lost, cut = [], 0
    for row, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        if all(label == -100 for label in labels[:max_length]):
            lost.append(row)
        else:
            cut += max(len(ids), len(labels)) > max_length
    rule = f"sft.max_length ({max_length} tokens)"
    if len(lost) == len(rows):
        raise ValueError(
            f"sft.max_length: each of the {len(rows)} prompts of {split} fills {rule}; raise it, or cut them"
        )
    if (lost or cut) and PartialState().is_main_process:
        words = [f"{cut} are cut to {rule}"] if cut else []
        if lost:
            words.append(f"{len(lost)} are left out, because their prompts fill {rule}: the first is row {lost[0]}")
        print(f"sft: of {len(rows)} examples of {split} {', and '.join(words)}", file=sys.stderr)
    gone = set(lost)
    return rows.select([row for row in range(len(rows)) if row not in gone]) if lost else rows


def build_sft_trainer(
    model: PreTrainedModel,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset,
    peft_config: LoraConfig | None,
    metrics_file: Path,
) -> ResumableSFTTrainer:
    """TRL's trainer over tokenised splits; every log event is also a line of `metrics_file`."""
    completion_only = args.completion_only_loss is not False
    # TRL's fused LM head needs Triton to skip the tokens that carry no loss; without it, ours does.
    triton = torch.cuda.is_available() or torch.xpu.is_available()
    fused = triton or args.loss_type != "nll" or args.router_aux_loss_coef
    seq2seq = model.config.is_encoder_decoder
    trainer_class = EncoderDecoderSFTTrainer if seq2seq else ResumableSFTTrainer if fused else CompletionHeadSFTTrainer
    evaluates = args.eval_strategy != "no"
    limit = position_limit(model.config)
    if limit is not None and (args.max_length is None or args.max_length > limit):
        args.max_length = limit  # TRL's default knows nothing of the model
    length = None if args.packing else args.max_length  # packing splits what is longer
    train = fit_examples(sft_dataset(tokenizer, train, completion_only, seq2seq), length, "train")
    if evaluates:
        packs = args.packing if args.eval_packing is None else args.eval_packing
        rows = sft_dataset(tokenizer, validation, completion_only, seq2seq)
        validation = fit_examples(rows, None if packs else args.max_length, "validation")
    if peft_config is not None:
        set_seed(args.seed)  # TRL draws the adapter before transformers sets the seed
    trainer = trainer_class(
        model=model,
        args=args,
        processing_class=tokenizer,
        data_collator=EncoderDecoderCollator(decoder_prefix(model), tokenizer.pad_token_id) if seq2seq else None,
        train_dataset=train,
        eval_dataset=validation if evaluates else None,
        peft_config=None if peft_config is None else adapter_config(model, peft_config),
        callbacks=[MetricsFileCallback(metrics_file)],
    )
    if isinstance(trainer.model, PeftModel):
        check_adapter(trainer.model)
    return trainer


def last_checkpoint(args: SFTConfig) -> str | None:
    """The newest intact checkpoint an interrupted run left, to be resumed from; damaged ones are named on stderr.

    One in another directory than `args.output_dir` is there for its weights alone.

    Raises:
        ValueError: files are missing from a checkpoint, or all are damaged.
    """
    found, notes = weights_alone(Path(args.output_dir))
    if not found:
        found, more = newest_checkpoint(Path(args.output_dir))
        notes += [*more, *([f"continuing from {found}"] if found else [])]
    if PartialState().is_main_process:
        for note in notes:
            print(note, file=sys.stderr)
    return str(found) if found else None


class CompletionHeadSFTTrainer(ResumableSFTTrainer):
    """TRL's trainer with the same loss, its LM head run only on the tokens that carry loss.

    On a device without Triton, TRL 1.16 scores every position, prompt and padding included, in elementwise torch
    operations: two thirds of the time of a small model on a CPU. Here a hook narrows the LM head's input, so that the
    model's own forward, with whatever it does to its logits, sees the scored positions alone.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy in nats, summed over labelled tokens and divided by their number in the whole batch."""
        labels = self._targets(inputs["labels"])
        scored = labels != -100
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, hidden: (hidden[0][scored],))
        try:
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        finally:
            hook.remove()
        targets = labels[scored]
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        loss = torch.nn.functional.cross_entropy(
            outputs.logits.float(), targets, reduction="none", label_smoothing=smoothing
        )
        if self.args.loss_type == "dft":  # each token by its probability: Wu et al. 2025, arXiv:2508.05629
            loss = loss * (-loss).exp().detach()
        loss = loss.sum()
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is global
        correct = self.accelerator.gather((outputs.logits.argmax(-1) == targets).sum()).sum()
        seen = self.accelerator.gather(scored.sum()).sum().clamp(min=1)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append((correct / seen).item())
        return (loss, outputs) if return_outputs else loss

    def _targets(self, labels: Tensor) -> Tensor:
        """What each position predicts, [B, T]; -100 where nothing is scored."""
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


class EncoderDecoderSFTTrainer(CompletionHeadSFTTrainer):
    """The same for encoder-decoders: the collator has moved the decoder's input, so labels stand where they are."""

    def _targets(self, labels: Tensor) -> Tensor:
        return labels

    def _track_num_input_tokens(self, inputs) -> None:
        """Count the tokens of the completions beside those of the prompts, as they count for a causal model."""
        both = {
            "input_ids": torch.cat([inputs["input_ids"], inputs["labels"]], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], inputs["labels"] != -100], dim=1),
        }
        super()._track_num_input_tokens(both)


@dataclass(frozen=True)
class EncoderDecoderCollator:
    """Prompts for the encoder and completions for the decoder, both padded right.

    The decoder reads `prefix`, which is given and carries no loss, then the completion but its last token.
    """

    prefix: list[int]
    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """`input_ids, attention_mask [B, P]` and `decoder_input_ids, labels [B, T]`."""
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad_id)
        given = [-100] * (len(self.prefix) - 1)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "decoder_input_ids": pad_right([self.prefix + row["labels"][:-1] for row in rows], self.pad_id)[0],
            "labels": pad_right([given + row["labels"] for row in rows], -100)[0],
        }
