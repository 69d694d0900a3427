"""Choose the next tokens from their logits: greedy, or by one uniform number for each row and step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.models.speech import ForbiddenTokens
from pipeline.runtime.devices import float64_device, in_float64, sum_in_float64

BLOCK = 128  # tokens of the vocabulary whose probabilities are added up before a block of them is searched


@dataclass(frozen=True)
class Decoding:
    """How to write a completion of at most `max_new_tokens` tokens. `temperature` None: greedy, or beam search.

    No end is written before `min_new_tokens`, a text that holds one of `stop_strings` ends there, and none of
    `suppress_tokens` is written, nor one of `begin_suppress_tokens` as the first token. `top_k`, `top_p`, `min_p` and
    `repetition_penalty` are for samples alone: what they do is that of transformers' `GenerationConfig`.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    begin_suppress_tokens: tuple[int, ...] = ()

    def with_forbidden(self, forbidden: ForbiddenTokens) -> "Decoding":
        """Return the same with the tokens that a model itself forbids."""
        return replace(
            self,
            suppress_tokens=(*self.suppress_tokens, *forbidden.always),
            begin_suppress_tokens=(*self.begin_suppress_tokens, *forbidden.first),
        )


class TokenChooser:
    """Choose the next token of each row, without waiting for an accelerator to finish.

    Args:
        decoding: Greedy, or how to sample.
        ends: Tokens that are not chosen before `min_new_tokens`.
        read: What each row has been read by the network that writes: the prompt, or what a decoder begins with.
        draws: Uniform numbers in [0, 1), [B, max_new_tokens], on the device of the logits; None for greedy.
    """

    def __init__(
        self, decoding: Decoding, ends: Sequence[int], read: Sequence[Sequence[int]], draws: Tensor | None
    ) -> None:
        self.decoding, self.read, self.draws = decoding, read, draws
        self.penalised = draws is not None and decoding.repetition_penalty != 1
        forbidden = ((decoding.suppress_tokens, decoding.max_new_tokens), (ends, decoding.min_new_tokens))
        forbidden += ((decoding.begin_suppress_tokens, 1),)
        self._forbidden = [(list(tokens), steps) for tokens, steps in forbidden if tokens and steps]
        self._index: list[tuple[Tensor, int]] = []  # the same on the device of the logits
        self._seen = self._broken = torch.zeros(0)

    def __call__(self, logits: Tensor, steps: int | Tensor, rows: Tensor) -> Tensor:
        """Return tokens [N] from `logits [N, V]`, which may be changed.

        `steps` is how many tokens the `rows [N]` have: all as many, or each its own number [N].
        """
        if self.penalised:
            if not len(self._seen):
                self._seen = _tokens_read(self.read, logits)
            logits = penalise_repetition(logits, self._seen[rows], self.decoding.repetition_penalty)
        logits = self._without_forbidden(logits, steps)
        if self.draws is None:
            return logits.argmax(-1)
        tokens = sample_tokens(logits, self.decoding, self.draws[rows, steps])
        broken = (tokens < 0).any().unsqueeze(0)
        self._broken = (self._broken | broken) if len(self._broken) else broken
        tokens = tokens.clamp(min=0)
        if self.penalised:
            self._seen[rows, tokens] = True
        return tokens

    def check(self) -> None:
        """Refuse what was chosen by probabilities that are not numbers.

        Raises:
            FloatingPointError: the probabilities of a token were not finite.
        """
        if self._broken.any():
            raise FloatingPointError(
                "generation: the probabilities of the next token are not finite (NaN in the model)"
            )

    def _without_forbidden(self, logits: Tensor, steps: int | Tensor) -> Tensor:
        if len(self._index) < len(self._forbidden):
            self._index = [(torch.tensor(tokens, device=logits.device), until) for tokens, until in self._forbidden]
        for tokens, until in self._index:
            if isinstance(steps, Tensor):
                logits[:, tokens] = logits[:, tokens].masked_fill((steps < until).unsqueeze(1), -torch.inf)
            elif steps < until:
                logits.index_fill_(1, tokens, -torch.inf)
        return logits


def _tokens_read(read: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Mark which tokens of the vocabulary each row has read, [B, V]."""
    seen = torch.zeros(len(read), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for row, ids in enumerate(read):
        seen[row, list(ids)] = True
    return seen


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative `logits [N, V]` of tokens that were `seen [N, V]` (arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample_tokens(logits: Tensor, decoding: Decoding, draws: Tensor) -> Tensor:
    """Sample a token for each row of `logits [N, V]`: invert its cumulative distribution at `draws [N]` in [0, 1).

    Returns:
        Token ids [N], and -1 where the probabilities are not finite.
    """
    order, device = None, logits.device
    if decoding.temperature != 1:
        logits = logits / decoding.temperature
    if decoding.top_k or decoding.top_p < 1:
        logits, order = logits.topk(min(decoding.top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = torch.softmax(logits, dim=-1)
    if decoding.top_p < 1 or decoding.min_p:
        probabilities = in_float64(probabilities)
    if decoding.top_p < 1:  # the fewest likeliest tokens that together reach top_p
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= decoding.top_p, 0.0)
    if decoding.min_p:  # at least this share of the likeliest token's probability
        likeliest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < decoding.min_p * likeliest, 0.0)
    index = invert_cumulative(probabilities, draws).to(device)
    if order is None:
        return index
    tokens = order.gather(-1, index.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(index < 0, index, tokens)


def invert_cumulative(weights: Tensor, draws: Tensor) -> Tensor:
    """Find the first of `weights [N, V]` whose cumulative sum passes the share `draws [N]` of the whole sum.

    Sums are taken in float64, in which small probabilities of a large vocabulary count. They are taken of blocks
    first: the weights are read once, and only one block of each row is summed step by step.

    Returns:
        Positions [N], never of a weight of 0, and -1 where the sum is not a number.
    """
    weights = weights.to(float64_device(weights.device))
    size = weights.shape[-1]
    whole = size // BLOCK
    sums = sum_in_float64(weights[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), -1)
    if size % BLOCK:
        sums = torch.cat([sums, sum_in_float64(weights[:, whole * BLOCK :], -1).unsqueeze(1)], dim=1)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    targets = in_float64(draws).unsqueeze(1) * total
    block = torch.searchsorted(cumulative, targets, right=True).clamp(max=sums.shape[1] - 1)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = in_float64(weights.gather(1, columns.clamp(max=size - 1))).masked_fill(columns >= size, 0.0).cumsum(-1)
    rest = targets - (cumulative.gather(1, block) - sums.gather(1, block))
    # Both sums of a block are rounded: what is left may be all of it, which would be past its end.
    rest = torch.minimum(rest, inside[:, -1:].nextafter(torch.zeros_like(rest)))
    position = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    return torch.where(total.isnan(), -1, position).squeeze(1)
