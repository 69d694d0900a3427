"""Prompts and completions as padded tensors. Masks come from lengths, never from token ids: pad may equal EOS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.models.speech import Sound, make_sound


@dataclass(frozen=True)
class Sequences:
    """`prompt_ids, prompt_mask [B, P]` padded left and `completion_ids, completion_mask [B, C]` padded right.

    Masks are True on real tokens. Every completion has at least one token. `encoder_states [B, P, H]`, padded right,
    is what an encoder made of the prompts, kept where nothing in the encoder trains. The prompts of a speech model are
    the tokens that its decoder is given, as many in every row, and `sound` has the clips.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    encoder_states: Tensor | None = None
    sound: Sound | None = None

    @cached_property
    def made(self) -> dict[tuple[str, int], object]:
        """What passes over these rows share; a GPU is waited for to make it."""
        return {}

    @cached_property
    def completion_at(self) -> Tensor:
        """Where the M real completion tokens stand in the flattened [B * C]."""
        return self.completion_mask.flatten().nonzero().squeeze(1)

    @cached_property
    def targets(self) -> Tensor:
        """The M real completion tokens in row order."""
        return self.completion_ids.flatten().index_select(0, self.completion_at)

    def scatter(self, values: Tensor) -> Tensor:
        """Put `values [M]` of the completion tokens into [B, C], 0 elsewhere."""
        mask = self.completion_mask
        return values.new_zeros(mask.numel()).index_copy(0, self.completion_at, values).view(mask.shape)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, prompt and completion together, [B]."""
        return self.prompt_mask.sum(1) + self.completion_mask.sum(1)

    def rows(self, index: Tensor) -> "Sequences":
        """The rows at `index`, trimmed to the longest prompt and the longest completion among them."""
        prompt = int(self.prompt_mask[index].sum(1).max())
        completion = int(self.completion_mask[index].sum(1).max())
        width = self.prompt_ids.shape[1]
        return Sequences(
            self.prompt_ids[index, width - prompt :],
            self.prompt_mask[index, width - prompt :],
            self.completion_ids[index, :completion],
            self.completion_mask[index, :completion],
            None if self.encoder_states is None else self.encoder_states[index, :prompt],
            None if self.sound is None else self.sound.rows(index),
        )

    def prompt_numbers(self) -> Tensor:
        """[B] numbers that are equal where prompts are."""
        mask = self.prompt_mask
        clips = [] if self.sound is None else [self.sound.index.unsqueeze(1)]
        keyed = torch.cat([self.prompt_ids.masked_fill(~mask, 0), mask.sum(1, keepdim=True), *clips], dim=1)
        return torch.unique(keyed, dim=0, return_inverse=True)[1]

    def chunks(self, size: int) -> list[Tensor]:
        """Row indices in order of length, `size` at a time: little padding, and equal prompts side by side."""
        numbers, lengths = self.prompt_numbers(), self.lengths
        longest = torch.zeros_like(lengths).scatter_reduce(0, numbers, lengths, "amax")[numbers]
        return list(torch.argsort(longest * len(self) + numbers, stable=True).split(size))

    def batches(self, size: int) -> list[tuple[Tensor, "Sequences"]]:
        """Row indices as `chunks` gives them, each with those rows; made once, until another size is asked for."""
        key = ("batches", size)
        if key not in self.made:
            self.made.clear()
            self.made[key] = [(index, self.rows(index)) for index in self.chunks(size)]
        return self.made[key]

    def encoder_inputs(self) -> tuple[Tensor, Tensor]:
        """The prompts as an encoder reads them, `ids, mask [B, P]` padded right: its positions count from the left."""
        width = self.prompt_ids.shape[1]
        columns = torch.arange(width, device=self.prompt_ids.device)
        lengths = self.prompt_mask.sum(1, keepdim=True)
        order = (columns + width - lengths) % width
        return self.prompt_ids.gather(1, order), columns < lengths

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """`ids, mask [B, longest]` with the padding before the tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """`ids, mask [B, longest]` with the padding after the tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def make_sequences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Sequences:
    """Pad token lists, or spoken prompts and token lists, into one batch.

    Raises:
        ValueError: an empty prompt or an empty completion, which no position could predict or score.
    """
    for kind, rows in (("prompt", prompts), ("completion", completions)):
        empty = [i for i, row in enumerate(rows) if len(row) == 0]
        if empty:
            raise ValueError(f"{kind} {empty[0]} has no tokens")
    padded = (*pad_left(prompts, pad_id, device), *pad_right(completions, pad_id, device))
    return Sequences(*padded, sound=make_sound(prompts, device))


def at_first_and_later(
    mask: Tensor, compute: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Compute two numbers for the first token of each completion and for the later ones, each [M] in row order.

    `mask [B, C]` has the M real tokens. `compute` gets which of them, and whether these are the first ones.
    """
    first = mask.nonzero()[:, 1] == 0
    tokens = {True: first.nonzero().squeeze(1), False: (~first).nonzero().squeeze(1)}
    results = [compute(index, is_first) for is_first, index in tokens.items() if len(index)]
    order = torch.cat(list(tokens.values())).argsort()
    # Not by indexing, whose gradient adds up in any order where there are several threads.
    left, right = (torch.cat(values).index_select(0, order) for values in zip(*results, strict=True))
    return left, right


def length_sorted_chunks(lengths: Tensor, size: int) -> list[Tensor]:
    """Row indices in order of length, cut into chunks of `size`: rows of a chunk need little padding."""
    return list(torch.argsort(lengths, stable=True).split(size))


def length_sorted_blocks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split the rows into blocks of `size` alike in length, the same for any number of processes."""
    return [chunk.tolist() for chunk in length_sorted_chunks(torch.tensor(lengths), size)]


def probe_sequences(vocabulary: int, limit: int | None, device: torch.device) -> Sequences:
    """Make rows of many tokens, all over the vocabulary, to compare two ways of computing; two share their prompt.

    `limit` is how many positions the model has.
    """
    longest = min(48, limit or 48)
    ids = torch.randint(vocabulary, (4 * longest,), generator=torch.Generator().manual_seed(0)).tolist()
    shared, long, short = ids[: longest // 2], ids[longest : longest + 2 * longest // 3], ids[-1:]
    answers = [ids[start : start + longest // 3] for start in (3, 7, 11)]
    completions = [answers[0], answers[1][: longest // 5 + 1], answers[2], answers[0][1:3]]
    return make_sequences([shared, shared, long, short], completions, 0, device)
