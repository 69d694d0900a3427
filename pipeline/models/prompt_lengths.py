"""Whether prompts leave a model room for what is written or scored behind them."""

from collections.abc import Callable, Sequence

from transformers import PretrainedConfig

from pipeline.models.loading import position_limit
from pipeline.models.speech import MOST_GIVEN, reads_sound

DECODER_PREFIX = 2  # at most: start token and language code


def decoder_room(config: PretrainedConfig) -> int | None:
    """Return how many tokens the decoder of an encoder-decoder can write; None where there is no limit."""
    limit = position_limit(config)
    return None if limit is None else limit - (MOST_GIVEN if reads_sound(config) else DECODER_PREFIX)


def answer_room(prompt: Sequence[int], config: PretrainedConfig) -> int | None:
    """Return how many tokens the model can write after a prompt (token ids); None where there is no limit."""
    limit = position_limit(config)
    if limit is None or config.is_encoder_decoder:
        return decoder_room(config)
    return limit - len(prompt)


def unfit_prompts(
    prompts: Sequence[Sequence[int]], new_tokens: int, config: PretrainedConfig, key: str
) -> dict[int, str]:
    """Return the prompts (token ids) that are empty, or after which `new_tokens` tokens do not fit into the positions.

    By row, with the reason; `key` is the recipe's name of `new_tokens`.
    """
    limit = position_limit(config)
    reasons = {row: "the prompt has no tokens" for row, ids in enumerate(prompts) if not ids}
    if limit is None:
        return reasons
    added = 0 if config.is_encoder_decoder else new_tokens  # the two sides of an encoder-decoder have their own
    for row, ids in enumerate(prompts):
        if len(ids) + added > limit:
            wanted = "does not fit into" if config.is_encoder_decoder else f"leaves no room for {new_tokens} tokens in"
            reasons[row] = f"{key}: the prompt of {len(ids)} tokens {wanted} the {limit} positions of the model"
    return reasons


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    config: PretrainedConfig,
    key: str,
    split: str,
    where: Callable[[list[int]], str] = lambda rows: f"row {rows[0]} (the first is row 0)",
) -> None:
    """Refuse prompts (token ids) that are empty, or after which `new_tokens` tokens do not fit into the positions.

    `key` is the recipe's name of `new_tokens`, `split` that of the rows, and `where` says where a row is.

    Raises:
        ValueError: how many prompts, and the first or the longest of them.
    """
    unfit = unfit_prompts(prompts, new_tokens, config, key)
    empty = [row for row in unfit if not prompts[row]]
    if empty:
        raise ValueError(
            f"task: {len(empty)} of {len(prompts)} prompts of {split} have no tokens, the first in "
            f"{where(empty[:1])}; mend or remove them"
        )
    if unfit:
        longest = max(unfit, key=lambda row: len(prompts[row]))
        wanted = "do not fit into" if config.is_encoder_decoder else f"leave no room for {new_tokens} tokens in"
        raise ValueError(
            f"{key}: {len(unfit)} of {len(prompts)} prompts of {split} {wanted} the {position_limit(config)} "
            f"positions of the model (max_position_embeddings), the longest with {len(prompts[longest])} tokens in "
            f"{where([longest])}; {'' if config.is_encoder_decoder else f'lower {key}, or '}shorten or remove them"
        )


def check_token_ids(rows: Sequence[Sequence[int]], embeddings: int, what: str) -> None:
    """Refuse token ids that a model with so many embeddings does not have; `what` the rows are stands in the message.

    Raises:
        ValueError: how many rows, the first of them and its token.
    """
    unknown = [(row, max(ids)) for row, ids in enumerate(rows) if ids and max(ids) >= embeddings]
    if unknown:
        row, token = unknown[0]
        raise ValueError(
            f"model: {len(unknown)} of {len(rows)} {what} have tokens beyond the model's {embeddings} embeddings, the "
            f"first in row {row} (token {token}); use the model's own tokenizer and chat template, or "
            "model.resize_token_embeddings"
        )


def truncate_prompts(
    prompts: Sequence[Sequence[int]], targets: Sequence[list[int]], config: PretrainedConfig
) -> tuple[list[list[int]], int]:
    """Cut from `targets` the tokens that have no position after their prompts; return how many were cut too."""
    limit = position_limit(config)
    if limit is None:
        return list(targets), 0
    has_own_positions = config.is_encoder_decoder and not reads_sound(config)
    given = [DECODER_PREFIX if has_own_positions else len(prompt) for prompt in prompts]
    cut = [target[: max(1, limit - start)] for target, start in zip(targets, given, strict=True)]
    return cut, sum(len(new) < len(old) for new, old in zip(cut, targets, strict=True))
