"""Turn text into token ids and back: the one place where prompts are rendered, so every stage reads equal tokens."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.runtime.files import sha256

SOURCE = sha256(Path(__file__))  # in the key of cached tokens: `datasets` does not see that a module has changed
Messages = list[dict[str, str]]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Messages], encoder_decoder: bool = False
) -> list[list[int]]:
    """Tokenise prompts, plain texts or chat messages, without padding or truncation.

    Chat prompts go through the tokenizer's chat template with its generation prompt. Plain prompts get the special
    tokens that the tokenizer puts *before* a text (a BOS). An encoder also reads what the tokenizer puts after a text
    (EOS, language code); for a causal model an EOS is removed, because the model has to continue the prompt.

    Raises:
        ValueError: chat messages and a tokenizer without a chat template.
    """
    prompts = list(prompts)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    plain = iter(_encode_plain(tokenizer, texts, encoder_decoder))
    rendered = iter(_tokenise(tokenizer, _render_chats(tokenizer, chats, generation_prompt=True)))
    return [next(plain if isinstance(prompt, str) else rendered) for prompt in prompts]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
) -> list[list[int]]:
    """Tokenise completions, each ending with EOS: what the model should write after `encode_prompts(prompts)`.

    Prompt and completion are tokenised apart, so no token merges across the boundary and the ids seen in training
    are the ids generation starts from.
    """
    pairs = list(zip(prompts, completions, strict=True))
    texts = [completion for prompt, completion in pairs if isinstance(prompt, str)]
    chats = [pair for pair in pairs if not isinstance(pair[0], str)]
    plain = iter(tokenizer(text_target=texts, add_special_tokens=False)["input_ids"] if texts else [])
    turns = iter(_tokenise(tokenizer, _render_last_turns(tokenizer, chats)))
    eos = tokenizer.eos_token_id
    return [[*next(plain), eos] if isinstance(prompt, str) else _until_last(next(turns), eos) for prompt, _ in pairs]


def encode_prompts_of(
    tokenizer: PreTrainedTokenizerBase, examples: Dataset, encoder_decoder: bool = False
) -> list[list[int]]:
    """Tokenise the column `prompt` as `encode_prompts` does, and keep the ids where `datasets` keeps the examples.

    A later stage or another process finds them there; examples that are only in memory are tokenised each time.
    """

    def encode(batch: dict[str, list], source: str) -> dict[str, list]:
        return {"prompt_ids": encode_prompts(tokenizer, batch["prompt"], encoder_decoder)}

    prompts = examples.select_columns("prompt")
    options = {"remove_columns": "prompt", "fn_kwargs": {"source": SOURCE}, "desc": "Tokenizing prompts"}
    try:
        if prompts.cache_files:
            return prompts.map(encode, batched=True, **options)["prompt_ids"][:]
    except OSError:  # a folder that cannot be written, or a full disk
        pass
    return encode_prompts(tokenizer, prompts["prompt"], encoder_decoder)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of token ids, without special tokens and surrounding white space."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def plain_text(value: str | Messages) -> str:
    """Return the text of a prompt or completion, with chat messages joined by newlines."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def _tokenise(tokenizer: PreTrainedTokenizerBase, rendered: list[str]) -> list[list[int]]:
    # A chat template writes the special tokens itself.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []


def _encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str], encoder_decoder: bool) -> list[list[int]]:
    encoded = tokenizer(texts)["input_ids"] if texts else []
    if not encoder_decoder:
        for text, ids in zip(texts, encoded, strict=True):
            while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
                ids.pop()
    return encoded


def _render_chats(tokenizer: PreTrainedTokenizerBase, chats: list[Messages], generation_prompt: bool) -> list[str]:
    if not chats:
        return []
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the data holds chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use a chat model, or give a plain-text prompt template in task.prompt"
        )
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=generation_prompt, tokenize=False)
    except Exception as error:  # a template comes with a model and may do anything that its sandbox allows, or tries
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} cannot be filled with the data's messages "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another template or model"
        ) from error


def _render_last_turns(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[Messages, str | Messages]]) -> list[str]:
    """Render what the template writes after each prompt: the completion, and the tokens that end it."""
    answers = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for _, c in pairs]
    starts = _render_chats(tokenizer, [prompt for prompt, _ in pairs], generation_prompt=True)
    chats = [prompt + answer for (prompt, _), answer in zip(pairs, answers, strict=True)]
    wholes = _render_chats(tokenizer, chats, generation_prompt=False)
    for start, whole in zip(starts, wholes, strict=True):
        if not whole.startswith(start):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} renders a prompt differently once it is answered, "
                "so training and generation would read different prompts; use another template"
            )
    return [whole[len(start) :] for start, whole in zip(starts, wholes, strict=True)]


def _until_last(ids: list[int], eos: int) -> list[int]:
    """Return the ids up to the last EOS, which is added where there is none."""
    if eos in ids:  # templates often write a newline after the end-of-turn token
        return ids[: len(ids) - ids[::-1].index(eos)]
    return [*ids, eos]
