"""Trainers for SFT on TRL's: one that resumes, and one that runs the LM head only on tokens that carry loss."""

import torch
from torch import Tensor
from trl import SFTTrainer

from pipeline.trainers.huggingface.resumable import ResumableTrainer


class ResumableSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's SFT trainer with exact resume."""


class CompletionHeadSFTTrainer(ResumableSFTTrainer):
    """TRL's SFT trainer with the same loss, whose LM head runs only on the tokens that carry loss.

    Without Triton, TRL 1.16 scores every position, prompt and padding included: two thirds of the time of a small
    model on a CPU. Here a hook keeps only the scored positions of the LM head's input. The model's own forward stays
    in charge of everything it does to its logits.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the cross-entropy in nats, summed over labelled tokens and divided by their number in the batch."""
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
        """Return what each position predicts, [B, T], with -100 where nothing is scored."""
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
