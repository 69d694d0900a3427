"""Trainers for SFT on TRL's: one that resumes, and one that runs the LM head only on tokens that carry loss."""

from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from trl import SFTTrainer

from pipeline.runtime.memory import free_memory, in_smaller_batches, is_out_of_memory
from pipeline.runtime.messages import say
from pipeline.trainers.huggingface.resumable import ResumableTrainer


class ResumableSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's SFT trainer with exact resume, which makes smaller passes where the memory of its accelerator runs out."""

    rows_of_a_pass: int | None = None  # once memory has run out; None: a micro-batch is one pass

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Compute one micro-batch; where memory runs out, in more passes, whose gradients add up to the same.

        Where not even one row fits, layers are computed again in the backward pass.
        """
        step = super().training_step
        if not self._is_alone():
            return step(model, inputs, num_items_in_batch)
        parameters = [p for p in model.parameters() if p.requires_grad]
        earlier = [p.grad for p in parameters]  # of the micro-batches before it
        tokens, metrics = self._total_train_tokens, {name: [*seen] for name, seen in self._metrics["train"].items()}

        def attempt(rows: int) -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            self._total_train_tokens = tokens
            self._metrics["train"] = defaultdict(list, {name: [*seen] for name, seen in metrics.items()})
            passes = zip(*(tensor.split(rows) for tensor in inputs.values()), strict=True)
            losses = [step(model, dict(zip(inputs, tensors, strict=True)), num_items_in_batch) for tensors in passes]
            return torch.stack(losses).sum()

        # The loss is a sum over tokens but where a router's is added, which is a mean over each pass.
        count, is_sum = len(inputs["labels"]), num_items_in_batch is not None and not self.aux_loss_enabled
        compute = self._in_passes if is_sum else lambda attempt, count: attempt(count)
        network, loss = self.accelerator.unwrap_model(model), None
        try:
            loss = compute(attempt, count)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if network.is_gradient_checkpointing or not is_out_of_memory(error):
                raise
        if loss is None:  # after the block, where the traceback no longer holds the pass that failed
            free_memory()
            say("out of memory: from now on layers are computed again in the backward pass (gradient_checkpointing)")
            network.gradient_checkpointing_enable({"use_reentrant": False})
            loss = compute(attempt, count)
        for parameter, gradient in zip(parameters, earlier, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _is_alone(self) -> bool:
        """Tell whether one accelerator trains by rows that can be parted, and nothing else waits for this pass."""
        is_one = self.accelerator.distributed_type == DistributedType.NO and self.args.n_gpu == 1
        return is_one and not self.padding_free

    def _in_passes(self, attempt: Callable[[int], Tensor], count: int) -> Tensor:
        before = min(self.rows_of_a_pass or count, count)
        loss, rows = in_smaller_batches(attempt, before)
        if rows < before:
            self.rows_of_a_pass = rows
            say(f"out of memory: from now on passes of {rows} rows instead of {before}, as many as before to a step")
        return loss


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
