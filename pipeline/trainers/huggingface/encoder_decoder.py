"""SFT of encoder-decoders: the prompt goes to the encoder, the completion to the decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.sequences import pad_right
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
