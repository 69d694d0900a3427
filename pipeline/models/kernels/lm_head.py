"""Log-probs and entropies of chosen tokens from the LM head, without keeping [tokens, vocabulary]."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Rows of [tokens, vocabulary] that exist at once, in numbers (64 MiB of float32); on an accelerator at least 256 MiB,
# and as much as this share of its memory: thin products and their kernels would take longer than the passes over them.
LOGIT_BUDGET, LEAST_ON_ACCELERATORS, SHARE_OF_MEMORY = 2**24, 2**26, 1 / 64
# On a CPU fewer (8 MiB), which its caches hold, for most of the work is passes over them: but no product too thin to
# be fast, and a multiple of that, because oneDNN compiles bf16 kernels for each number of rows.
CACHED_LOGITS, THINNEST = 2**21, 128

Head = Callable[[Tensor], Tensor]  # states [N, H] -> logits [N, V] as `widened_logits` gives them
# What is added to the logit of a token that is never written: its probability is then 0 to the last bit, and unlike
# an infinity it leaves p log p finite.
SUPPRESSED = -1e9


def suppression(vocabulary: int, tokens: Iterable[int]) -> Tensor | None:
    """What to add to the logits, [V], so that `tokens` have probability 0; None where there are none."""
    chosen = list(tokens)
    return torch.zeros(vocabulary).index_fill_(0, torch.tensor(chosen), SUPPRESSED) if chosen else None


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its LM head: `offset [V]` is added, then they are multiplied, then capped.

    A cap c makes c * tanh(logit / c) of a logit, which stays between -c and c (Gemma 2, arXiv:2408.00118, section 2).
    `suppressed [V]`, as `suppression` makes it, is added last.
    """

    offset: Tensor | None = None
    multiplier: float = 1.0
    cap: float | None = None
    suppressed: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits [N, V], which stay as they are."""
        if self.offset is not None:
            logits = logits + self.offset
        if self.multiplier != 1:
            logits = logits * self.multiplier
        logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        return logits if self.suppressed is None else logits + self.suppressed

    def slope(self, transformed: Tensor) -> Tensor | float:
        """The derivative of transformed logits [N, V] by those of the head: [N, V], or one number for all of them."""
        if self.cap is None:
            return self.multiplier
        return (transformed / self.cap).square_().neg_().add_(1.0).mul_(self.multiplier)


UNCHANGED = LogitTransform()


def token_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    temperature: float,
    entropy_gradient: bool,
    transform: LogitTransform = UNCHANGED,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats), [M] each, float32 or wider, of `targets [M]` given `hidden [M, H]`.

    Entropies have a gradient only with `entropy_gradient`. `transform` is what the model does to the head's logits.
    """
    frozen = not entropy_gradient and _is_frozen(head)
    # Others would be computed twice in small pieces.
    rows = _piece_rows(vocabulary, hidden.device) if frozen else max(1, _budget(hidden.device) // vocabulary)
    weight, bias = (_as_multiplied(t) for t in (head.weight, head.bias)) if frozen else (None, None)
    pieces = []
    for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
        if frozen:
            pieces.append(_FrozenHead.apply(states, weight, bias, tokens, temperature, transform))
        elif len(tokens) == len(targets):
            pieces.append(_score(head, states, tokens, temperature, entropy_gradient, transform))
        else:
            given = (head, states, tokens, temperature, entropy_gradient, transform)
            pieces.append(checkpoint(_score, *given, use_reentrant=False))
    return torch.cat([logprobs for logprobs, _ in pieces]), torch.cat([entropies for _, entropies in pieces])


@torch.no_grad()
def target_logprobs(head: Head, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Log-probs (nats) of `targets [M]` given `hidden [M, H]`, without gradients: [M]; `head` is the whole LM head."""
    rows = _piece_rows(vocabulary, hidden.device)
    pieces = [
        _log_softmax(head(states), 1.0).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(pieces)


@torch.no_grad()
def entropies_and_divergences(
    own: tuple[Head, Tensor], other: tuple[Head, Tensor] | None, vocabulary: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Entropies of a model and KL(it || another), in nats, without gradients: [M] each; 0 without another.

    Each model is its whole LM head and the states [M, H] that it reads. No more exists at once than where PPO computes
    log-probs: three tensors [rows, vocabulary].
    """
    (head, hidden), (other_head, other_hidden) = own, other or own
    rows = _piece_rows(vocabulary, hidden.device)

    def piece(states: Tensor, other_states: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = _log_softmax(head(states), temperature)
        if other is None:
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            return entropies, torch.zeros_like(entropies)
        ratios = _log_softmax(other_head(other_states), temperature).sub_(logprobs)
        probabilities = logprobs.exp()
        divergences = -ratios.mul_(probabilities).sum(-1)
        return -logprobs.mul_(probabilities).sum(-1), divergences

    pieces = [piece(*states) for states in zip(hidden.split(rows), other_hidden.split(rows), strict=True)]
    return torch.cat([entropies for entropies, _ in pieces]), torch.cat([divergences for _, divergences in pieces])


def _piece_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of [rows, vocabulary] that exist at once where each piece is computed only once."""
    rows = max(1, _budget(device) // vocabulary)
    if device.type != "cpu":
        return rows
    return min(rows, max(THINNEST, CACHED_LOGITS // vocabulary // THINNEST * THINNEST))


def _budget(device: torch.device) -> int:
    """Numbers of [tokens, vocabulary] that exist at once on a device."""
    return LOGIT_BUDGET if device.type == "cpu" else _accelerator_budget(device)


@cache
def _accelerator_budget(device: torch.device) -> int:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(LEAST_ON_ACCELERATORS, int(memory * SHARE_OF_MEMORY) // torch.float32.itemsize)


def _as_multiplied(tensor: Tensor | None) -> Tensor | None:
    """Cast a frozen tensor as autocast does for each product; autocast remembers only casts of what is trained."""
    kind = "cpu" if tensor is None else tensor.device.type
    if tensor is None or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _is_frozen(head: nn.Module) -> bool:
    """Whether the head is a plain layer that is not trained, whole on this device (ZeRO-3 and FSDP leave a stub)."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.shape == (head.out_features, head.in_features)
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


class _FrozenHead(torch.autograd.Function):
    """Where the head is not trained, all that the backward pass needs is one vector a token.

    The gradient of a log-prob by its hidden state, (one-hot - p) W / temperature, is taken while the logits are at
    hand, and only scaled later: no logits are kept or computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, weight, bias)
        dtype, logits = logits.dtype, widened_logits(logits, transform)
        logprobs = _log_softmax(logits, temperature)
        by_logits = transform.slope(logits) if ctx.needs_input_grad[0] else 1.0
        del logits
        chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        probabilities = logprobs.exp()
        entropies = -logprobs.mul_(probabilities).sum(-1)
        if ctx.needs_input_grad[0]:
            slope = probabilities.neg_()
            slope.scatter_add_(-1, targets.unsqueeze(-1), torch.ones_like(slope[:, :1]))
            if transform.cap is not None or transform.multiplier != 1:
                slope.mul_(by_logits)
            by_hidden = slope.to(dtype) @ weight.to(dtype)
            ctx.save_for_backward(by_hidden if temperature == 1 else by_hidden / temperature)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden * gradient.unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None


def widened_logits(logits: Tensor, transform: LogitTransform = UNCHANGED) -> Tensor:
    """Transform the logits of a head, in float32 or wider."""
    return transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1:
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def _score(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    entropy_gradient: bool,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    logprobs = _log_softmax(widened_logits(head(hidden), transform), temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies
