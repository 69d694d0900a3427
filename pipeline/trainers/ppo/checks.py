"""Checks of PPO's first seconds, so that a run of hours does not fail, or learn from nonsense, later."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.generation import eos_token_ids
from pipeline.models.loading import position_limit
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.reward_model import check_base
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.speech import CLIP, reads_sound
from pipeline.models.states import ROUNDING, check_causal, check_trunk_and_head
from pipeline.rewards import Reward
from pipeline.rewards.learned import adapter_rewards

PROBE_ROWS = 4
HALF = (torch.float16, torch.bfloat16)


def check_trained_dtypes(model: nn.Module) -> None:
    """Refuse trained weights of half precision, which steps as small as PPO's do not change: they are rounded away.

    Raises:
        ValueError: naming the first of them.
    """
    narrow = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    narrow = [(name, str(weight.dtype).removeprefix("torch.")) for name, weight in narrow if weight.dtype in HALF]
    if narrow:
        name, dtype = narrow[0]
        raise ValueError(
            f"model: PPO would train {name} in {dtype}, where its small steps are rounded away; load the model with "
            "dtype=torch.float32 (model.dtype: float32), or train an adapter alone: passes are computed in bfloat16 "
            "all the same"
        )


def check_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    rewards: Sequence[Reward],
    suppress_tokens: Sequence[int] = (),
) -> None:
    """Look at what PPO is given before anything is built from it.

    Raises:
        ValueError: no rows, no special tokens, suppressed tokens that the model has not or
            without which no completion ends, or a learned reward over another model.
    """
    if len(dataset) == 0:
        raise ValueError("train_dataset: it has no rows, so there is no prompt to answer")
    check_sound(model, dataset)
    check_special_tokens(model, tokenizer)
    check_suppressed(suppress_tokens, model, tokenizer)
    for reward in adapter_rewards(rewards):
        check_base(reward.record, model, tokenizer, model.config.name_or_path)


def first_examples(dataset: Dataset) -> dict[str, list]:
    """Take two examples for the rewards to score, with a completion each if the data has any.

    A reference goes before the completion, which may be a message that calls a tool and has no text.
    """
    first = dataset[: min(2, len(dataset))]
    references = first.get("references")
    if references and all(texts and isinstance(texts, list) and isinstance(texts[0], str) for texts in references):
        return {**first, "completion": [texts[0] for texts in references]}
    return first


def check_start(
    model: SharedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    response_length: int,
    accelerator: Accelerator,
) -> None:
    """Look at the tokenised prompts, and compute what the first step rests on.

    Raises:
        ValueError: as `check_prompt_ids`, `check_first_step` and `check_trunk_and_head`.
    """
    check_prompt_ids(prompts, response_length, model.language_model)
    check_first_step(model, prompts, tokenizer, accelerator)
    check_causal(model.language_model)
    check_trunk_and_head(model.language_model)  # last: noise and NaN would look like it


def check_sound(model: PreTrainedModel, dataset: Dataset) -> None:
    """Refuse prompts of text for a model that hears, and clips for one that reads.

    Raises:
        ValueError: naming the column.
    """
    has_clips, kind = CLIP in dataset.column_names, model.config.model_type
    if reads_sound(model.config) and not has_clips:
        raise ValueError(
            f"train_dataset: a {kind!r} hears sound, and there is no column `{CLIP}`; make it with "
            "pipeline.models.clips.hear"
        )
    if has_clips and not reads_sound(model.config):
        raise ValueError(f"train_dataset: a {kind!r} reads text; remove the column `{CLIP}`")


def check_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without an EOS or pad token, or with one that the model has no embedding for.

    Raises:
        ValueError: naming the token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for name, token in (("eos", tokenizer.eos_token_id), ("pad", tokenizer.pad_token_id)):
        if token is None:
            raise ValueError(
                f"processing_class: the tokenizer {tokenizer.name_or_path!r} has no {name} token; "
                f"set tokenizer.{name}_token (EOS may serve as padding)"
            )
        if token >= rows:
            raise ValueError(
                f"processing_class: the {name} token of {tokenizer.name_or_path!r} is number {token}, but the model "
                f"has {rows} embeddings; use the model's own tokenizer, or model.resize_token_embeddings"
            )


def check_suppressed(tokens: Sequence[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to suppress tokens that the model does not have, or every token that ends a completion.

    Raises:
        ValueError: naming the tokens.
    """
    rows, ends = model.get_input_embeddings().weight.shape[0], eos_token_ids(model, tokenizer)
    if unknown := [token for token in tokens if token >= rows]:
        raise ValueError(f"ppo.suppress_tokens: the model has {rows} tokens, found {unknown}; remove them")
    if set(ends) <= set(tokens):
        raise ValueError(
            f"ppo.suppress_tokens: it holds all that ends a completion ({', '.join(map(str, ends))}); leave one out"
        )


def check_prompt_ids(
    prompts: Sequence[Sequence[int]], response_length: int, model: PreTrainedModel, split: str = "train_dataset"
) -> None:
    """Refuse prompts that are empty, leave no room to generate, or hold tokens that the model does not know.

    Raises:
        ValueError: how many prompts, and the first or the longest of them.
    """
    if not prompts:
        return
    empty = [row for row, ids in enumerate(prompts) if not ids]
    if empty:
        raise ValueError(
            f"{split}: {len(empty)} of {len(prompts)} prompts have no tokens, the first in row {empty[0]}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    unknown = [row for row, ids in enumerate(prompts) if max(ids) >= rows]
    if unknown:
        raise ValueError(
            f"{split}: {len(unknown)} of {len(prompts)} prompts have tokens beyond the model's {rows} embeddings, the "
            f"first in row {unknown[0]}; use the model's own tokenizer, or model.resize_token_embeddings"
        )
    spoken = reads_sound(model.config)
    limit, prefix = position_limit(model.config), len(prompts[0] if spoken else decoder_prefix(model))
    if prefix and limit is not None and prefix + response_length - 1 > limit:
        raise ValueError(
            f"ppo.response_length: the decoder of the model has {limit} positions (max_position_embeddings), of which "
            f"{prefix} are given before a completion; {response_length} more tokens do not fit: lower it"
        )
    check_prompt_lengths(prompts, response_length, model.config, "ppo.response_length", split)


def check_first_step(
    model: SharedModel, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> None:
    """Compute on a few rows what PPO's first step rests on: a ratio of 1 and a KL of 0, exactly but for rounding.

    The prompts serve as completions too: both must hold for any tokens, and nothing has to be generated. Sound is
    answered by any tokens.

    Raises:
        ValueError: numbers that are not finite, a ratio that is not 1 or a KL that is not 0, with the likely cause.
    """
    rows, answers = [ids[-64:] for ids in prompts[:PROBE_ROWS]], _probe_answers(model, prompts, tokenizer)
    sequences = make_sequences(rows, answers, tokenizer.pad_token_id, accelerator.device)
    with accelerator.autocast():
        with torch.no_grad():
            rollout, again = model(sequences).logprobs, model(sequences).logprobs
        reference = model.reference_logprobs(sequences)[0]
        with torch.enable_grad():
            update = model(sequences).logprobs.detach()
    kind = model.language_model.config.model_type
    if not all(torch.isfinite(logprobs).all() for logprobs in (rollout, reference, update)):
        raise ValueError(
            f"model: log-probabilities of {kind!r} are not finite before the first step; "
            "the weights are broken, or their range needs model.dtype: float32"
        )
    allowed = ROUNDING[torch.bfloat16 if accelerator.mixed_precision == "bf16" else model.language_model.dtype]
    repeated, ratio, kl = (_largest(logprobs - rollout, sequences) for logprobs in (again, update, reference))
    if repeated > allowed:
        raise ValueError(
            f"model: two passes of {kind!r} over the same text differ by up to {repeated:.2g} nats a token, so the "
            "first ratio of PPO would not be 1; likely a dropout or routing noise that PPO could not switch off: set "
            "it to 0 in the model's configuration"
        )
    if ratio > allowed:
        raise ValueError(
            f"model: passes of {kind!r} in training and in rollouts differ by up to {ratio:.2g} nats a token, so the "
            "first ratio of PPO would not be 1; likely a part that computes otherwise under gradients: try "
            "ppo.gradient_checkpointing: false or model.attn_implementation: eager"
        )
    if kl > allowed:
        raise ValueError(
            f"model: policy and reference differ by up to {kl:.2g} nats a token before the first step, so KL would "
            "not start at 0; likely an adapter that does not start at zero (init_lora_weights), or a model that "
            "already carries an adapter: merge it first"
        )


def _probe_answers(
    model: SharedModel, prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return completions that the model may write: tokens of the prompts, or any in answer to sound, and an end."""
    never, vocabulary = model.suppressed, model.language_model.get_output_embeddings().weight.shape[0]
    end = next(token for token in eos_token_ids(model.language_model, tokenizer) if token not in never)
    rows = prompts[:PROBE_ROWS]
    if reads_sound(model.language_model.config):
        written = [token for token in range(vocabulary) if token not in model.suppressed_first][: 4 * PROBE_ROWS]
        rows = [written[row :: len(rows)] for row in range(len(rows))]
    return [[*(token for token in ids[:15] if token not in never), end] for ids in rows]


def check_kl(kl: float, limit: float | None, step: int, best_step: int) -> None:
    """Refuse to learn on from a policy that has run away from the reference, by `kl` nats per episode.

    Raises:
        FloatingPointError: beyond `limit`, naming the step and the best checkpoint.
    """
    if limit is not None and not kl <= limit:
        kept = f"; the best checkpoint so far is that of step {best_step}" if best_step else ""
        raise FloatingPointError(
            f"PPO step {step}: the KL to the reference is {kl:.3g} nats per episode, beyond ppo.max_kl {limit:g}{kept}"
            "; lower ppo.learning_rate, raise ppo.kl_coef or set ppo.kl_target"
        )


def _largest(difference: Tensor, sequences: Sequences) -> float:
    return float(difference[sequences.completion_mask].abs().max())
