"""Log-probs and entropies of chosen tokens from the LM head, without keeping [tokens, vocabulary]."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Rows of [tokens, vocabulary] that exist at once, in numbers (64 MiB of float32).
LOGIT_BUDGET = 2**24
# On a CPU fewer (8 MiB), which its caches hold, for most of the work is passes over them: but no product too thin to
# be fast, and a multiple of that, because oneDNN compiles bf16 kernels for each number of rows.
CACHED_LOGITS, THINNEST = 2**21, 128


def token_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    temperature: float,
    entropy_gradient: bool,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats), [M] each, float32 or wider, of `targets [M]` given `hidden [M, H]`.

    Entropies have a gradient only with `entropy_gradient`. `offset [V]` is added to the head's logits.
    """
    frozen = not entropy_gradient and _is_frozen(head)
    rows = max(1, LOGIT_BUDGET // vocabulary)
    if frozen and hidden.device.type == "cpu":  # others would be computed twice in pieces
        rows = min(rows, max(THINNEST, CACHED_LOGITS // vocabulary // THINNEST * THINNEST))
    pieces = []
    for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
        if frozen:
            pieces.append(_FrozenHead.apply(states, head.weight, head.bias, tokens, temperature, offset))
        elif len(tokens) == len(targets):
            pieces.append(_score(head, states, tokens, temperature, entropy_gradient, offset))
        else:
            given = (head, states, tokens, temperature, entropy_gradient, offset)
            pieces.append(checkpoint(_score, *given, use_reentrant=False))
    return torch.cat([logprobs for logprobs, _ in pieces]), torch.cat([entropies for _, entropies in pieces])


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
        offset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, weight, bias)
        logprobs = _log_softmax(logits, temperature, offset)
        chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        probabilities = logprobs.exp()
        entropies = -logprobs.mul_(probabilities).sum(-1)
        if ctx.needs_input_grad[0]:
            slope = probabilities.neg_()
            slope.scatter_add_(-1, targets.unsqueeze(-1), torch.ones_like(slope[:, :1]))
            by_hidden = slope.to(logits.dtype) @ weight.to(logits.dtype)
            ctx.save_for_backward(by_hidden if temperature == 1 else by_hidden / temperature)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden * gradient.unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None


def _log_softmax(logits: Tensor, temperature: float, offset: Tensor | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if offset is not None:
        logits = logits + offset
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _score(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    entropy_gradient: bool,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logprobs = _log_softmax(head(hidden), temperature, offset)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies
