"""What one PPO step collects, a rollout, and what it learns from, an experience."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.models.generation import Completions, Decoding, finished, generate, seed_samples
from pipeline.models.prompts import encode_prompts_of
from pipeline.models.sequences import Sequences
from pipeline.models.shared import PolicyOutputs, SharedModel
from pipeline.models.text import decode
from pipeline.rewards import RewardLog
from pipeline.runtime.memory import in_smaller_batches
from pipeline.runtime.seeds import derive_seed, keep_random_state
from pipeline.trainers.ppo.moving_reference import MovingReference
from pipeline.trainers.ppo.scores import RunningMoments

Warn = Callable[[str], None]


@dataclass(frozen=True)
class TokenOutputs:
    """What the models compute for each completion token before the update, without gradients: all [B, C]."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class Rollout:
    """One batch of episodes on this process, before any update.

    `prompts`, `completions` (texts) and `finished [B]` are the episodes; `sequences` holds their token ids.
    `logprobs, ref_logprobs, values, entropies [B, C]` are `TokenOutputs`. `rewards` has each reward function's own
    values [B] by name, NaN where it returned none. `scores [B]`, `token_scores [B, C]`, `scored [B]`, `moments` and
    `failures` are `ProcessedScores`: nothing is learnt from an episode where `scored` is False. `log` has what the
    reward functions logged.
    """

    prompts: Sequence[object]
    completions: Sequence[str]
    finished: Tensor
    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    rewards: dict[str, Tensor]
    scores: Tensor
    token_scores: Tensor
    scored: Tensor
    moments: RunningMoments
    failures: Sequence[str]
    log: RewardLog = field(default_factory=RewardLog)

    @property
    def mask(self) -> Tensor:
        """The tokens that are learnt from, [B, C]."""
        return self.sequences.completion_mask & self.scored.unsqueeze(1)


@dataclass(frozen=True)
class Experience:
    """What the update learns from: `logprobs, ref_logprobs, values, advantages, returns [B, C]` and the sequences.

    `mask [B, C]` is True on the tokens that are learnt from. The policy loss is a sum over tokens, each times its
    `weights [B, C]`, divided by the sum of `counts [B]` over the mini-batch: tokens or completions. `kl_coef` is the
    weight of the KL to the reference in the loss: 0 where that KL is part of the rewards.
    """

    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor
    weights: Tensor
    counts: Tensor
    kl_coef: float = 0.0

    def rows(self, index: Tensor) -> "Experience":
        """Select the episodes at `index`, trimmed to the longest of them."""
        return self._with(index, self.sequences.rows(index))

    def _with(self, index: Tensor, sequences: Sequences) -> "Experience":
        width = sequences.completion_ids.shape[1]
        tensors = (self.logprobs, self.ref_logprobs, self.values, self.advantages, self.returns, self.mask)
        trimmed = (tensor[index, :width] for tensor in (*tensors, self.weights))
        return Experience(sequences, *trimmed, self.counts[index], self.kl_coef)

    def mini_batches(self, count: int, generator: torch.Generator) -> list["Experience"]:
        """Deal the episodes out to `count` random mini-batches. One keeps the order, which only changes rounding."""
        if count == 1:
            return [self]
        order = torch.randperm(len(self.sequences), generator=generator).to(self.logprobs.device)
        return [self.rows(index) for index in order.chunk(count)]

    def micro_batches(self, size: int) -> list["Experience"]:
        """Split into at most `size` episodes at a time, alike in length and trimmed, so that little is padding."""
        return [self._with(*batch) for batch in self.sequences.batches(size)]

    @property
    def num_tokens(self) -> int:
        """Tokens that are learnt from."""
        return int(self.mask.sum())


class CompletionWriter:
    """Write completions with the current policy, in smaller batches once memory has run out.

    Of a model that is sharded over processes each writes in a block of `gathered()`.
    """

    def __init__(
        self,
        shared: SharedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        batch_size: int,
        warn: Warn,
        strip_thoughts: bool = False,
        gathered: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.shared, self.tokenizer, self.accelerator, self.gathered = shared, tokenizer, accelerator, gathered
        self.batch_size, self.warn, self.strip_thoughts = batch_size, warn, strip_thoughts

    def encode(self, examples: Dataset) -> list[list[int]]:
        """Tokenise the column `prompt`, texts or chat messages, as the policy reads it."""
        return encode_prompts_of(self.tokenizer, examples, self.shared.language_model.config.is_encoder_decoder)

    def write(
        self,
        prompt_ids: Sequence[Sequence[int]],
        decoding: Decoding,
        sample_seed: int | None = None,
        rank: int | None = None,
    ) -> Completions:
        """Write one completion for each prompt; `sample_seed` seeds the samples and leaves torch's generator alone.

        The samples are those of process `rank`; None: of this one.
        """
        model, rank = self.shared.language_model, self.accelerator.process_index if rank is None else rank
        with keep_random_state(sample_seed is not None), self.accelerator.autocast():
            if sample_seed is not None:
                seed_samples(model, decoding, sample_seed, rank, len(prompt_ids))
            ids = self.generate(prompt_ids, decoding)
        ended = torch.tensor(finished(model, self.tokenizer, ids, decoding))
        return Completions(ids, self.decode(ids), ended)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of completions as rewards and metrics see them."""
        return decode(self.tokenizer, ids, self.strip_thoughts)

    def generate(self, prompt_ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
        """Token ids of one completion for each prompt, with the same draws for any batch size."""
        self.shared.eval()
        state, before = torch.get_rng_state(), self.batch_size

        def attempt(size: int) -> list[list[int]]:
            torch.set_rng_state(state)
            return generate(self.shared.language_model, self.tokenizer, prompt_ids, decoding, size)

        ids, self.batch_size = in_smaller_batches(attempt, before)
        if self.batch_size < before:
            self.warn(
                f"out of memory: from now on {self.batch_size} prompts at once instead of {before} to write "
                "completions"
            )
        self.shared.train()
        return ids


@torch.no_grad()
def compute_token_outputs(
    model: SharedModel,
    sequences: Sequences,
    size: int,
    reference: MovingReference | None = None,
    keep_graph: bool = False,
) -> tuple[TokenOutputs, PolicyOutputs | None]:
    """Compute policy, reference and value of every token, in the micro-batches of at most `size` of the update.

    The same rows together give the same rounding, so that the update's first ratio is exactly 1. `reference`: one that
    follows the policy, in place of the model's own. With `keep_graph`, and where one micro-batch holds every row, the
    policy's pass over it comes with its graph, for one backward pass; else None.
    """
    chunks, batches = zip(*sequences.batches(size), strict=True)
    if reference is None:
        reference_outputs = model.reference_logprobs(*batches)
    else:
        with reference.in_place():
            reference_outputs = [model(batch).logprobs for batch in batches]
    is_kept = keep_graph and len(batches) == 1
    with torch.set_grad_enabled(is_kept):
        outputs = [model(batch) for batch in batches]
    logprobs, values, entropies, ref_logprobs = (
        _restore_order(tensors, chunks, sequences.completion_mask.shape)
        for tensors in (
            [output.logprobs for output in outputs],
            [output.values for output in outputs],
            [output.entropies for output in outputs],
            reference_outputs,
        )
    )
    return TokenOutputs(logprobs, ref_logprobs, values, entropies), outputs[0] if is_kept else None


def _restore_order(tensors: Sequence[Tensor], chunks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Put trimmed results of chunks of rows back where their rows are in a batch of `shape`."""
    result = tensors[0].new_zeros(shape)
    for tensor, index in zip(tensors, chunks, strict=True):
        result[index, : tensor.shape[1]] = tensor
    return result


def local_positions(done: int, batch_size: int, copies: int, accelerator: Accelerator) -> list[int]:
    """Return this process's positions in the prompt order after `done` episodes, each `copies` times."""
    local = batch_size // copies // accelerator.num_processes
    start = done // copies + accelerator.process_index * local
    return [position for position in range(start, start + local) for _ in range(copies)]


def prompt_order(size: int, seed: int) -> Callable[[int], int]:
    """Return `position -> row`: every epoch is a new permutation of `size` rows, drawn from `seed` and the epoch.

    Nothing has to be saved to go on at a position after a restart.
    """
    cache: dict[int, list[int]] = {}

    def row(position: int) -> int:
        epoch, offset = divmod(position, size)
        if epoch not in cache:
            for old in [e for e in cache if e < epoch - 1]:
                del cache[old]
            generator = torch.Generator().manual_seed(derive_seed(seed, "prompt order", epoch))
            cache[epoch] = torch.randperm(size, generator=generator).tolist()
        return cache[epoch][offset]

    return row
