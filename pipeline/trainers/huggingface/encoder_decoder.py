"""SFT of encoder-decoders: the prompt goes to the encoder, the completion to the decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.sequences import pad_right
from pipeline.models.speech import CLIP, read_clip
from pipeline.trainers.huggingface.completion_head import CompletionHeadSFTTrainer


@dataclass(frozen=True)
class EncoderDecoderCollator:
    """Pads prompts for the encoder and completions for the decoder, both on the right.

    The decoder reads `prefix`, which carries no loss, then the completion without its last token.
    """

    prefix: list[int]
    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Return `input_ids, attention_mask [B, P]` and `decoder_input_ids, labels [B, T]`."""
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad_id)
        no_loss = [-100] * (len(self.prefix) - 1)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "decoder_input_ids": pad_right([self.prefix + row["labels"][:-1] for row in rows], self.pad_id)[0],
            "labels": pad_right([no_loss + row["labels"] for row in rows], -100)[0],
        }


@dataclass(frozen=True)
class SpeechCollator:
    """Reads the features of clips for the encoder, and pads completions for the decoder on the right.

    The decoder reads the given tokens in `input_ids`, which carry no loss, then the completion without its last token.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_features [B, num_mel_bins, T]` and `decoder_input_ids, labels [B, T]`."""
        no_loss = [-100] * (len(rows[0]["input_ids"]) - 1)
        return {
            "input_features": torch.stack([read_clip(row[CLIP]).features() for row in rows]),
            "decoder_input_ids": pad_right([row["input_ids"] + row["labels"][:-1] for row in rows], self.pad_id)[0],
            "labels": pad_right([no_loss + row["labels"] for row in rows], -100)[0],
        }


class EncoderDecoderSFTTrainer(CompletionHeadSFTTrainer):
    """The same trainer for encoder-decoders, whose labels already stand where they are predicted."""

    def _targets(self, labels: Tensor) -> Tensor:
        return labels

    def _track_num_input_tokens(self, inputs) -> None:
        """Count the tokens of prompts and completions, as they are counted for a causal model."""
        both = {
            "input_ids": torch.cat([inputs["input_ids"], inputs["labels"]], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], inputs["labels"] != -100], dim=1),
        }
        super()._track_num_input_tokens(both)


class SpeechSFTTrainer(EncoderDecoderSFTTrainer):
    """The same trainer for models that hear: the column `clip` reaches the collator, and texts alone are counted."""

    def _set_signature_columns_if_needed(self) -> None:
        is_set = self._signature_columns is not None
        super()._set_signature_columns_if_needed()
        if not is_set:
            self._signature_columns = [*self._signature_columns, CLIP]

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return the loss of a batch whose features have the precision of a frozen base: no layer casts them."""
        features = inputs["input_features"].to(self.accelerator.unwrap_model(model).dtype)
        return super().compute_loss(model, {**inputs, "input_features": features}, *args, **kwargs)

    def _track_num_input_tokens(self, inputs) -> None:
        """Count the tokens of the texts."""
        labels = inputs["labels"]
        texts = {"input_ids": labels, "input_features": labels, "attention_mask": labels != -100}
        CompletionHeadSFTTrainer._track_num_input_tokens(self, texts)
