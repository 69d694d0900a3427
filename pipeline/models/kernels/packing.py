"""Padding-free passes: the real tokens of a batch as one row, each prompt once however many completions answer it.

Linear layers, norms and activations, nearly all of a pass, then see no padding and no repeated prompt. Attention alone
needs rows: it is computed for the prompts, then for the completions, which read their prompt's keys and their own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.models.sequences import Sequences

IMPLEMENTATIONS = ("eager", "sdpa")  # the attention functions that rows are handed to; others keep padded batches
PREFIX = "padding_free_"
LAYERS = {"full_attention", "sliding_attention"}  # of config.layer_types; others mix tokens in ways of their own


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed row stand in padded rows: U different prompts, then B completions, then tokens that
    nobody reads.

    The last token of a completion is never read, so completions have C = longest - 1 columns, and none where every
    completion is one token long. `prompt_at, completion_at` are positions in the padded rows [U * P] and [B * C];
    `prompt_of [B]` is the prompt of each completion, None where it is the same row; `states_at [M]` is, for every
    completion token, the packed token after which it is predicted.
    """

    ids: Tensor
    positions: Tensor
    prompt_at: Tensor
    completion_at: Tensor
    prompt_of: Tensor | None
    prompt_mask: Tensor
    completion_mask: Tensor
    states_at: Tensor
    masks: dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        """Packed tokens that belong to prompts; they stand first."""
        return self.prompt_at.shape[0]

    @property
    def num_completion_tokens(self) -> int:
        """Packed tokens that belong to completions; they follow."""
        return self.completion_at.shape[0]

    def attention_masks(self, dtype: torch.dtype, additive: bool) -> tuple[Tensor, Tensor]:
        """True (or 0) where a token is read, False (or the lowest number): [U, 1, P, P] and [B, 1, C, P + C]."""
        key = (dtype, additive)
        if key not in self.masks:
            masks = [mask.unsqueeze(1) for mask in self._readable()]
            if additive:
                # Softmax is taken in float32: the lowest float64 would be -inf there, and a row of them NaN.
                lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
                masks = [torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill_(~m, lowest) for m in masks]
            self.masks[key] = (masks[0], masks[1])
        return self.masks[key]

    def _readable(self) -> tuple[Tensor, Tensor]:
        prompt, completion = (
            torch.arange(m.shape[1], device=m.device) for m in (self.prompt_mask, self.completion_mask)
        )
        owner = self.prompt_mask if self.prompt_of is None else self.prompt_mask[self.prompt_of]
        prompts = (prompt <= prompt.unsqueeze(1)) & self.prompt_mask.unsqueeze(1)
        causal = (completion <= completion.unsqueeze(1)).expand(len(owner), -1, -1)
        return prompts, torch.cat([owner.unsqueeze(1).expand(-1, len(completion), -1), causal], dim=2)


def pack(sequences: Sequences, multiple: int = 1) -> Packing:
    """Pack a batch into one row, in which rows with equal prompts share one prompt.

    Its length is made a multiple of `multiple` by tokens that nobody reads. It is computed once for a batch, without
    the masks, which grow with the square of the lengths.
    """
    key = ("packing", multiple)
    if key not in sequences.made:
        sequences.made[key] = _pack(sequences, multiple)
    return replace(sequences.made[key], masks={})


def _pack(sequences: Sequences, multiple: int) -> Packing:
    mask, numbers = sequences.prompt_mask, sequences.prompt_numbers()
    prompts, prompt_of = sequences.prompt_ids, None
    different = int(numbers.max()) + 1
    if different < len(mask):
        rows = torch.arange(len(mask), device=mask.device)
        first = numbers.new_full((different,), len(mask)).scatter_reduce(0, numbers, rows, "amin")
        prompts, mask, prompt_of = prompts[first], mask[first], numbers
    lengths = mask.sum(1)
    right = torch.arange(mask.shape[1], device=mask.device) < lengths.unsqueeze(1)
    completions, read = sequences.completion_ids[:, :-1], sequences.completion_mask[:, 1:]
    start = lengths if prompt_of is None else lengths[prompt_of]
    at = start.unsqueeze(1) + torch.arange(read.shape[1], device=mask.device)
    ids, positions = torch.cat([prompts[mask], completions[read]]), torch.cat([right.nonzero()[:, 1], at[read]])
    spare = -len(ids) % multiple
    return Packing(
        ids=functional.pad(ids, (0, spare)),
        positions=functional.pad(positions, (0, spare)),
        prompt_at=right.flatten().nonzero().squeeze(1),
        completion_at=read.flatten().nonzero().squeeze(1),
        prompt_of=prompt_of,
        prompt_mask=right,
        completion_mask=read,
        states_at=_states_at(lengths, prompt_of, read, sequences.completion_mask),
    )


def _states_at(lengths: Tensor, prompt_of: Tensor | None, read: Tensor, mask: Tensor) -> Tensor:
    last = lengths.cumsum(0) - 1
    first = last if prompt_of is None else last[prompt_of]
    numbers = torch.zeros(read.shape, dtype=torch.long, device=read.device)
    numbers[read] = lengths.sum() + torch.arange(int(read.sum()), device=read.device)
    return torch.cat([first.unsqueeze(1), numbers], dim=1)[mask]


def enable_packing(model: PreTrainedModel) -> bool:
    """Let the model's attention layers read packed rows too; return False where they do not allow it."""
    implementation = model.config._attn_implementation
    if model.config.is_encoder_decoder:  # a decoder does not read its prompt by its own attention
        return False
    layers = set(model.config.get_text_config().to_dict().get("layer_types") or [])
    if implementation not in IMPLEMENTATIONS or not layers <= LAYERS or not model._can_set_attn_implementation():
        return False
    _register(implementation)
    model.set_attn_implementation(PREFIX + implementation)
    return True


def disable_packing(model: PreTrainedModel) -> None:
    """Undo `enable_packing`."""
    model.set_attn_implementation(model.config._attn_implementation.removeprefix(PREFIX))


def packed_states(model: PreTrainedModel, packing: Packing) -> Tensor:
    """[M, H]: for every completion token in row order, the state from which it is predicted."""
    unused = torch.zeros(1, 1, 1, 1, device=packing.ids.device)  # of this shape, models take a mask as ready
    output = model.base_model(
        input_ids=packing.ids.unsqueeze(0),
        position_ids=packing.positions.unsqueeze(0),
        attention_mask=unused,
        use_cache=False,
        packing=packing,
    )
    return output.last_hidden_state[0].index_select(0, packing.states_at)


class _Spread(torch.autograd.Function):
    """Packed tokens to padded rows, zero between them: `x [N, ...]`, `at [N]` -> [size, ...]."""

    @staticmethod
    def forward(ctx, x: Tensor, at: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """The way back: `x [size, ...]`, different `at [N]` -> [N, ...]. index_select's own gradient has to add up."""

    @staticmethod
    def forward(ctx, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.size = x.shape[0]
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, at, gradient), None


def _attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention over packed `query, key, value [1, heads, N, D]`, or the model's own where nothing is packed."""
    function = _function(implementation, module)
    if packing is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    unread = len(packing.ids) - packing.num_prompt_tokens - packing.num_completion_tokens
    parts = packing.num_prompt_tokens, packing.num_completion_tokens, unread  # whose gradients are one row again
    of_prompts, of_completions, _ = zip(*(x[0].transpose(0, 1).split(parts) for x in (query, key, value)), strict=True)
    masks = packing.attention_masks(query.dtype, implementation == "eager")
    prompts = [_rows(x, packing.prompt_at, packing.prompt_mask) for x in of_prompts]
    outputs = [_attend(function, module, *prompts, masks[0], packing.prompt_at, kwargs)]
    if packing.num_completion_tokens:
        query, *completions = (_rows(x, packing.completion_at, packing.completion_mask) for x in of_completions)
        readable = (
            prompts[1:] if packing.prompt_of is None else [x.index_select(0, packing.prompt_of) for x in prompts[1:]]
        )
        key, value = (torch.cat(pair, dim=1) for pair in zip(readable, completions, strict=True))
        outputs.append(_attend(function, module, query, key, value, masks[1], packing.completion_at, kwargs))
    if unread:
        outputs.append(outputs[0].new_zeros(unread, *outputs[0].shape[1:]))
    return torch.cat(outputs).unsqueeze(0), None


def _rows(x: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    return _Spread.apply(x, at, mask.numel()).view(*mask.shape, *x.shape[1:])


def _attend(
    function: Callable, module: nn.Module, query, key, value, mask: Tensor, at: Tensor, kwargs: dict
) -> Tensor:
    """[N, heads, D]: rows [rows, length, heads, D] attended to under the mask, without their padding."""
    output = function(module, *(x.transpose(1, 2) for x in (query, key, value)), mask, **kwargs)[0]
    return _Gather.apply(output.flatten(0, 1), at)


def _function(implementation: str, module: nn.Module) -> Callable:
    if implementation == "eager":  # every modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _register(implementation: str) -> None:
    """Make the packed way known to transformers, under the name of the attention function that it hands rows to."""

    def attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
        return _attention(implementation, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + implementation, attention)
    AttentionMaskInterface.register(PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
