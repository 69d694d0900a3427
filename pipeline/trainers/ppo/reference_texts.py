"""The task's own references, whose SFT loss `ptx_coef` mixes into PPO's (Ouyang et al. 2022, arXiv:2203.02155)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.loading import position_limit
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.speech import forbidden_tokens
from pipeline.models.text import encode_completions
from pipeline.trainers.ppo.config import PPOConfig


@dataclass(frozen=True)
class ReferenceTexts:
    """Token ids of each training prompt and of its reference, the column `completion`."""

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    pad_id: int

    def sequences(self, rows: Sequence[int], device: torch.device) -> Sequences:
        """Return the prompts and references of training `rows`."""
        prompts, completions = [self.prompt_ids[row] for row in rows], [self.completion_ids[row] for row in rows]
        return make_sequences(prompts, completions, self.pad_id, device)


def encode_references(
    args: PPOConfig,
    dataset: Dataset,
    prompt_ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> ReferenceTexts | None:
    """Tokenise the references, as SFT does; None where `args.ptx_coef` is 0.

    Raises:
        ValueError: no column `completion`, or references that do not fit the model or that it never writes.
    """
    if not args.ptx_coef:
        return None
    if "completion" not in dataset.column_names:
        raise ValueError(
            "ppo.ptx_coef: train_dataset needs a column completion with the text to learn; or set it to 0"
        )
    ids = encode_completions(tokenizer, dataset["prompt"], dataset["completion"])
    limit, shares = position_limit(model.config), not model.config.is_encoder_decoder
    lengths = [len(prompt) * shares + len(completion) for prompt, completion in zip(prompt_ids, ids, strict=True)]
    if limit is not None and max(lengths) > limit:
        raise ValueError(
            f"ppo.ptx_coef: {sum(length > limit for length in lengths)} of {len(ids)} references do not fit the "
            f"model's {limit} positions, the first in row {next(i for i, n in enumerate(lengths) if n > limit)}; "
            "leave such rows out, or set it to 0"
        )
    forbidden = forbidden_tokens(model)
    always = {*forbidden.always, *args.suppress_tokens}
    never = [row for row, answer in enumerate(ids) if {*answer} & always or answer[0] in forbidden.first]
    if never:
        raise ValueError(
            f"ppo.ptx_coef: {len(never)} of {len(ids)} references hold tokens that the model's generation config "
            f"or ppo.suppress_tokens forbids, the first in row {never[0]}; change these texts, or set it to 0"
        )
    return ReferenceTexts(prompt_ids, ids, tokenizer.pad_token_id)


def deal_out(references: Sequences | None, count: int, generator: torch.Generator) -> list[Sequences | None]:
    """Deal references out to `count` random mini-batches; those that get none have None."""
    if references is None:
        return [None] * count
    order = torch.randperm(len(references), generator=generator).to(references.completion_ids.device)
    dealt = [references.rows(index) for index in order.chunk(count)]
    return dealt + [None] * (count - len(dealt))
