"""Text to token ids and back: the only place where a prompt is rendered, so every stage reads the same tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Messages], encoder_decoder: bool = False
) -> list[list[int]]:
    """Token ids of each prompt, plain text or chat `messages`, with nothing padded or truncated.

    Chat prompts go through the tokenizer's chat template with its generation prompt. Plain prompts get the special
    tokens the tokenizer puts *before* a text (a BOS). What it puts behind one (EOS, language code) an encoder reads;
    for a causal model an EOS is removed, because it has to continue a prompt, not to see it ended.

    Raises:
        ValueError: chat messages and a tokenizer without a chat template.
    """
    return [
        _encode_chat(tokenizer, p) if isinstance(p, list) else _encode_plain(tokenizer, p, encoder_decoder)
        for p in prompts
    ]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
) -> list[list[int]]:
    """Token ids of each completion, ending with EOS: what the model should write after `encode_prompts(prompts)`.

    Prompt and completion are tokenised apart, so no token merges across the boundary and the ids seen in training
    are the ids generation starts from.
    """
    return [_encode_completion(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids, without special tokens and surrounding white space."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def plain_text(value: str | Messages) -> str:
    """Return the text of a prompt or completion, with chat messages joined by newlines."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, encoder_decoder: bool) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    if encoder_decoder:
        return ids
    while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def _render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the data holds chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use a chat model, or give a plain-text prompt template in task.prompt"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False)
    except Exception as error:  # a template comes with a model and may do anything that its sandbox allows, or tries
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} cannot be filled with the data's messages "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another template or model"
        ) from error


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    # The template writes the special tokens itself.
    return tokenizer(_render_chat(tokenizer, messages, generation_prompt=True), add_special_tokens=False)["input_ids"]


def _encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages
) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(text_target=completion, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    start = _render_chat(tokenizer, prompt, generation_prompt=True)
    whole = _render_chat(tokenizer, prompt + completion, generation_prompt=False)
    if not whole.startswith(start):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} renders a prompt differently once it is answered, "
            "so training and generation would read different prompts; use another template"
        )
    ids = tokenizer(whole[len(start) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id in ids:  # templates often write a newline after the end-of-turn token
        return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    return [*ids, tokenizer.eos_token_id]
