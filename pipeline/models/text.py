"""Turn text into token ids and back: the one place where prompts are rendered, so every stage reads equal tokens."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase, WhisperTokenizer

from pipeline.models import left_out
from pipeline.runtime.files import sha256

# In the key of cached tokens: `datasets` does not see that a module has changed.
SOURCE = sha256(Path(__file__)) + sha256(Path(left_out.__file__))
Messages = list[dict[str, Any]]
# Chat templates that write the date write this one, so that a prompt has the same tokens on every day.
TEMPLATE_DATE = datetime(2024, 7, 26)
# A macro takes the place of the function that gives templates the date of today; `%-d` is a day without a zero.
_DATE_PARTS = {f"%{letter}": TEMPLATE_DATE.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSUwWxXyY"}
_DATE_PARTS |= {f"%-{letter}": _DATE_PARTS[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmM"}
_DATE_REPLACED = "".join(f" | replace('{part}', '{text}')" for part, text in _DATE_PARTS.items())
_DATE_MACRO = f"{{% macro strftime_now(format) %}}{{{{ format{_DATE_REPLACED} }}}}{{% endmacro %}}"
# The lines that `set_chat_template` puts in front of a template.
_SETTINGS = re.compile(r"\{# chat_template_kwargs #\}.*?\{# end #\}\n?", re.DOTALL)
_QUESTION: Messages = [{"role": "user", "content": "?"}]
# A thought at the start of a text; where the prompt ends with `<think>`, a text has its end alone.
_THOUGHTS = re.compile(r"\s*<think>.*?(</think>|\Z)|((?!<think>).)*?</think>", re.DOTALL)


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
    rendered = iter(_tokenise(tokenizer, [render_chat(tokenizer, chat, generation_prompt=True) for chat in chats]))
    return [next(plain if isinstance(prompt, str) else rendered) for prompt in prompts]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
) -> list[list[int]]:
    """Tokenise completions, each ending with EOS: what the model should write after `encode_prompts(prompts)`.

    Prompt and completion are tokenised apart: no token merges across the boundary, and the ids seen in training are
    those that generation starts from. An answer in a chat has no space that a tokenizer puts in front of texts.
    """
    pairs = list(zip(prompts, completions, strict=True))
    texts = [completion for prompt, completion in pairs if isinstance(prompt, str)]
    if isinstance(tokenizer, WhisperTokenizer):  # whose model learnt texts with a space in front
        texts = [f" {text.lstrip()}" for text in texts]
    chats = [pair for pair in pairs if not isinstance(pair[0], str)]
    plain = iter(tokenizer(text_target=texts, add_special_tokens=False)["input_ids"] if texts else [])
    turns = iter(_encode_answers(tokenizer, chats))
    eos, ends = tokenizer.eos_token_id, {*getattr(tokenizer, "turn_ends", ())}
    return [
        [*next(plain), eos] if isinstance(prompt, str) else _until_end(tokenizer, next(turns), eos, ends)
        for prompt, _ in pairs
    ]


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], strip_thoughts: bool = False
) -> list[str]:
    """Return the texts of token ids, without special tokens and surrounding white space.

    What the chat template writes around every answer, such as an empty `<think></think>`, is no part of the answer and
    is left out; with `strip_thoughts` so is any `<think>...</think>` at the start. Of a thought that the generation
    prompt begins the text has the beginning too, as references have.
    """
    before, after = _template_additions(tokenizer)
    answers = [_bare_answer(text, before, after) for text in _decode(tokenizer, ids)]
    if strip_thoughts:
        return [without_thoughts(answer) for answer in answers]
    start = _begun_thought(tokenizer) if any("</think>" in answer for answer in answers) else ""
    return [start + answer if "</think>" in answer.partition("<think>")[0] else answer for answer in answers]


def without_thoughts(text: str) -> str:
    """Remove a thought at the start of a text, of which `<think>` may be in the prompt; one without end is all."""
    return _THOUGHTS.sub("", text, count=1).strip() if _THOUGHTS.match(text) else text


def plain_text(value: str | Messages) -> str:
    """Return the text of a prompt or completion, with chat messages joined by newlines."""
    if isinstance(value, str):
        return value
    return "\n".join(message["content"] or json.dumps(message.get("tool_calls") or "") for message in value)


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, settings: Mapping[str, object]
) -> PreTrainedTokenizerBase:
    """Give a tokenizer a chat template (None: keep its own) with variables set in it; return the tokenizer.

    The variables are written into the template, so that the template saved with a model renders as in training.

    Raises:
        ValueError: there are variables and no template.
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        if settings:
            raise ValueError(
                f"model.chat_template_kwargs: they would do nothing: the tokenizer {tokenizer.name_or_path!r} has no "
                "chat template; set model.chat_template, or remove them"
            )
        return tokenizer
    if settings:
        lines = "\n".join(f"{{% set {name} = {value!r} %}}" for name, value in settings.items())
        head = f"{{# chat_template_kwargs #}}\n{lines}\n{{# end #}}\n"
        is_named = isinstance(template, dict)  # some tokenizers have several, one of them for tools
        named = {
            name: head + _SETTINGS.sub("", text) for name, text in (template if is_named else {"": template}).items()
        }
        template = named if is_named else named[""]
    tokenizer.chat_template = template
    return tokenizer


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the chat template of a tokenizer asks for the date, and so gets `TEMPLATE_DATE`."""
    return "strftime_now" in str(tokenizer.chat_template)


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Messages, generation_prompt: bool = False) -> str:
    """Render a chat by the tokenizer's chat template, with the tools that its first message may hold as `tools`.

    Raises:
        ValueError: there is no template, it cannot be filled, or it leaves out a message, tools or their calls.
    """
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the data holds chat messages, but the tokenizer {name!r} has no chat template: use a chat model, set "
            "model.chat_template, or give a plain-text prompt template in task.prompt"
        )
    tools = chat[0].get("tools") if chat else None
    messages = [{key: value for key, value in message.items() if key != "tools"} for message in chat]

    def fill(messages: Messages) -> str:
        template = tokenizer.get_chat_template(tools=tools)
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=_DATE_MACRO + template if "strftime_now" in template else template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )

    try:
        text = fill(messages)
    except Exception as error:  # a template comes with a model and may do anything that its sandbox allows, or tries
        raise ValueError(
            f"the chat template of {name!r} cannot be filled with the data's messages "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another template or model"
        ) from error
    if problem := left_out.functions_problem(messages, tools, text) or left_out.message_problem(messages, text, fill):
        raise ValueError(f"the chat template of {name!r} {problem}")
    return text


def chat_problems(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Messages], completions: Sequence[str | Messages]
) -> list[str | None]:
    """Say of each prompt with its completion why it cannot be rendered; None where it can, as every plain text can."""

    def problem(prompt: str | Messages, completion: str | Messages) -> str | None:
        try:
            if not isinstance(prompt, str):
                _render_answer(tokenizer, prompt, completion)
        except ValueError as error:
            return str(error)
        return None

    return [problem(*pair) for pair in zip(prompts, completions, strict=True)]


def chat_problems_of(tokenizer: PreTrainedTokenizerBase, examples: Dataset) -> list[str | None]:
    """Return `chat_problems` of the columns `prompt` and `completion`, kept where `datasets` keeps the examples."""
    if not len(examples) or isinstance(examples.select_columns("prompt")[0]["prompt"], str):
        return [None] * len(examples)

    def find(batch: dict[str, list], source: str) -> dict[str, list]:
        return {"problem": chat_problems(tokenizer, batch["prompt"], batch["completion"])}

    chats = examples.select_columns(["prompt", "completion"])
    options = {"remove_columns": chats.column_names, "fn_kwargs": {"source": SOURCE}, "desc": "Rendering chats"}
    try:
        if chats.cache_files:
            features = Features({"problem": Value("string")})
            return chats.map(find, batched=True, features=features, **options)["problem"][:]
    except OSError:  # a folder that cannot be written, or a full disk
        pass
    return chat_problems(tokenizer, chats["prompt"][:], chats["completion"][:])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def _template_additions(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the texts that the chat template writes before and after every last answer, without special tokens."""
    if tokenizer.chat_template is None:
        return "", ""
    try:
        turns = [_render_answer(tokenizer, _QUESTION, word) for word in ("yes", "no")]
    except ValueError:  # a template that takes no such chat is refused where the data are rendered
        return "", ""
    (before, after), other = turns[0].split("yes", 1) if "yes" in turns[0] else ("", ""), turns[1]
    if f"{before}no{after}" != other:
        return "", ""
    return tuple(_decode(tokenizer, _tokenise(tokenizer, [before, after])))


def _begun_thought(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the `<think>` that generation prompts end with, if it is the beginning of every answer in the data."""
    tag = ""
    try:
        _, tag, rest = render_chat(tokenizer, _QUESTION, generation_prompt=True).rpartition("<think>")
        _render_answer(tokenizer, _QUESTION, "yes")
    except ValueError:  # before the tag is found: no chat template, or one that takes no such chat
        return tag + rest if tag and "</think>" not in rest else ""
    return ""  # the template writes it in front of every answer


def _bare_answer(text: str, before: str, after: str) -> str:
    if before and before.startswith(text):  # an answer that has not begun
        return ""
    return text.removeprefix(before).removesuffix(after).strip() if before or after else text


def _tokenise(tokenizer: PreTrainedTokenizerBase, rendered: list[str]) -> list[list[int]]:
    # A chat template writes the special tokens itself.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []


def _encode_answers(tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple]) -> list[list[int]]:
    answers = [_render_answer(tokenizer, *chat) for chat in chats]
    apart = _tokenise(tokenizer, answers)
    line, word, both = _tokenise(tokenizer, ["\n", "yes", "\nyes"])
    if line + word == both:  # else the tokenizer puts a space in front of every text: the whole chat is cut
        return apart
    starts = [render_chat(tokenizer, prompt, generation_prompt=True) for prompt, _ in chats]
    wholes = _tokenise(tokenizer, list(map(str.__add__, starts, answers)))
    rows = zip(_tokenise(tokenizer, starts), wholes, apart, strict=True)
    return [whole[len(ids) :] if whole[: len(ids)] == ids else alone for ids, whole, alone in rows]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str], encoder_decoder: bool) -> list[list[int]]:
    encoded = tokenizer(texts)["input_ids"] if texts else []
    if not encoder_decoder:
        for text, ids in zip(texts, encoded, strict=True):
            while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
                ids.pop()
    return encoded


def _render_answer(tokenizer: PreTrainedTokenizerBase, prompt: Messages, completion: str | Messages) -> str:
    """Render what the template writes after a prompt: the completion, and the tokens that end it."""
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    start = render_chat(tokenizer, prompt, generation_prompt=True)
    whole = render_chat(tokenizer, prompt + answer)
    if not whole.startswith(start):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} renders a prompt differently once it is answered, "
            "so training and generation would read different prompts; set model.chat_template, or "
            "model.chat_template_kwargs such as {enable_thinking: false}"
        )
    return whole[len(start) :]


def _until_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos: int, ends: Collection[int]) -> list[int]:
    """Return the ids up to the token at which generation ends the last turn; EOS is added where there is none.

    Templates often write a line break after that token, and Phi's EOS after both, which generation never reaches.
    """
    places = [place for place, token in enumerate(ids) if token == eos or token in ends]
    if not places:
        return [*ids, eos]
    last = places.pop()
    while places and not tokenizer.decode(ids[places[-1] + 1 : last]).strip():
        last = places.pop()
    return ids[: last + 1]
