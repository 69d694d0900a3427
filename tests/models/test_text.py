"""Text to tokens: SFT learns from exactly the prompt that PPO and evaluation generate from, in every shape of it."""

import dataclasses
import json

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.models.from_scratch import train_tokenizer
from pipeline.models.prompts import encode_prompts_of
from pipeline.models.text import decode, encode_completions, encode_prompts
from pipeline.tasks import load_task
from pipeline.tasks.columns import Config
from pipeline.trainers.huggingface.sft import sft_dataset

TEXTS = ["Wie geht es dir?", "Ganz gut, danke.", "the cat sat on the mat", "Frage: {x}\nAntwort:", "user assistant"]
AWKWARD = ["Größe, Übermut & ß", "😀👩‍👩‍👧 naïve — “ja”", "a\tb\n\nc", "…", "日本語", "e\u0301 é"]
PAIRS = [
    ("Wie geht es dir?\n", "Ganz gut, danke."),
    ("the cat ", " sat"),
    ("Antwort:", "(a) 1+1=2\n"),
    *((f"{text}\n", text) for text in AWKWARD),
    ("leer\n", ""),
]
TURN = "{{ '<|' + message.role + '|>' + message.content }}"
# How chat models write a turn: EOS at its end, EOS and a newline, another token than EOS.
TEMPLATES = {
    "eos": f"{{% for message in messages %}}{TURN}{{{{ eos_token }}}}{{% endfor %}}",
    "eos and newline": f"{{% for message in messages %}}{TURN}{{{{ eos_token + '\\n' }}}}{{% endfor %}}",
    "another token": f"{{{{ bos_token }}}}{{% for message in messages %}}{TURN}<|end|>{{% endfor %}}",
}
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = [
    {"role": "system", "content": "Sei kurz."},
    {"role": "user", "content": "Wie geht's?"},
    {"role": "assistant", "content": "Gut 😀"},
    {"role": "user", "content": "Größe?"},
]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def tokenizer(trained) -> PreTrainedTokenizerFast:
    """A fresh copy for each test."""
    backend = type(trained.backend_tokenizer).from_str(trained.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def surround(tokenizer, before="", after=""):
    """Let the tokenizer put special tokens around every text, as those of Llama (BOS) and T5 (EOS) do."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    template = " ".join(part for part in (before, "$A", after) if part)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def chat_tokenizer(tokenizer, template):
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{name}|>" for name in ("system", "user", "assistant", "end")]}
    )
    tokenizer.chat_template = TEMPLATES[template] + GENERATION
    return tokenizer


def examples(pairs) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": text, "references": [text]} for prompt, text in pairs])


def check_parity(tokenizer, pairs):
    """SFT's ids are the prompt's ids of PPO and evaluation, then the completion's with the loss on them alone."""
    rows = examples(pairs)
    prompts = encode_prompts(tokenizer, rows["prompt"])
    completions = encode_completions(tokenizer, rows["prompt"], rows["completion"])
    trained_on = sft_dataset(tokenizer, rows)
    assert len(trained_on) == len(pairs)
    for row, prompt, completion, (_, text) in zip(trained_on, prompts, completions, pairs, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["input_ids"][len(prompt) :] == completion
        assert row["labels"] == [-100] * len(prompt) + completion
        assert row["length"] == len(row["input_ids"])
        assert len(prompt) > 0 and completion[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in completion[:-1]
        assert decode(tokenizer, [completion]) == [text.strip()]


@pytest.mark.parametrize("special", [{}, {"before": "<s>"}, {"after": "</s>"}, {"before": "<s>", "after": "</s>"}])
def test_plain_prompts_are_the_same_in_every_stage(tokenizer, special):
    check_parity(surround(tokenizer, **special) if special else tokenizer, PAIRS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("special", [{}, {"before": "<s>", "after": "</s>"}])
def test_chat_prompts_are_the_same_in_every_stage(tokenizer, template, special):
    tokenizer = chat_tokenizer(surround(tokenizer, **special) if special else tokenizer, template)
    chats = [(CHAT, text) for _, text in PAIRS if text == text.strip()] + [(CHAT[1:2], "Gut.")]
    if template == "another token":  # <|end|> is written too, before the EOS that ends every completion
        ids = encode_completions(tokenizer, [CHAT], ["Gut."])[0]
        assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|end|>", "</s>"]
    check_parity(tokenizer, chats)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_prompt_is_what_the_template_says(tokenizer, template):
    tokenizer = chat_tokenizer(tokenizer, template)
    [ids] = encode_prompts(tokenizer, [CHAT])
    assert ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert (ids[0] == tokenizer.bos_token_id) == (template == "another token")


def test_an_answer_ends_where_its_turn_ends(tokenizer):
    """A template writes a newline after EOS, which generation never gets to: no loss is taken on it."""
    tokenizer = chat_tokenizer(tokenizer, "eos and newline")
    [ids] = encode_completions(tokenizer, [CHAT], ["Gut."])
    assert tokenizer.decode(ids).strip() == "Gut.</s>"
    assert ids == encode_completions(tokenizer, [CHAT], [[{"role": "assistant", "content": "Gut."}]])[0]


def test_a_beginning_is_marked_once_and_a_prompt_has_no_end(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = encode_prompts(tokenizer, ["the cat"])[0]
    assert encode_prompts(surround(tokenizer, "<s>", "</s>"), ["the cat"])[0] == [bos, *plain]
    assert encode_completions(tokenizer, ["the cat"], ["sat"])[0].count(bos) == 0
    assert encode_prompts(tokenizer, ["the cat</s>"])[0][-1] == eos  # an end that the prompt itself has stays


def test_pad_may_be_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    check_parity(tokenizer, PAIRS)
    check_parity(chat_tokenizer(tokenizer, "eos and newline"), [(CHAT, "Gut."), (CHAT[1:2], "Größe 😀")])


def test_loss_on_the_prompt_too(tokenizer):
    rows = sft_dataset(tokenizer, examples(PAIRS), completion_only_loss=False)
    assert rows["labels"][:] == rows["input_ids"][:]


def test_nothing_is_padded_or_cut(tokenizer):
    tokenizer.model_max_length = 8
    long = "the cat sat " * 50
    [short_ids, long_ids] = encode_prompts(tokenizer, ["cat", long])
    assert len(long_ids) >= 150 and len(short_ids) < 8
    assert len(encode_completions(tokenizer, ["x"], [long])[0]) == len(long_ids) + 1


@pytest.mark.parametrize("text", AWKWARD)
def test_text_is_written_and_read_back(tokenizer, text):
    [ids] = encode_completions(tokenizer, ["x"], [f"  {text}\n"])
    assert decode(tokenizer, [ids, ids[:-1]]) == [text, text]  # finished or not, without surrounding white space
    assert decode(tokenizer, [[*ids, tokenizer.pad_token_id]]) == [text]


def test_chat_needs_a_template(tokenizer):
    with pytest.raises(ValueError, match=r"the data holds chat messages, but the tokenizer .* has no chat template"):
        encode_prompts(tokenizer, [CHAT])


def test_a_template_that_renders_prompts_differently_once_answered_is_refused(tokenizer):
    tokenizer = chat_tokenizer(tokenizer, "eos")
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    with pytest.raises(ValueError, match="renders a prompt differently once it is answered"):
        encode_completions(tokenizer, [CHAT], ["Gut."])


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_same_from_the_data_on(tokenizer, tmp_path, kind):
    """From a file through a task: what SFT is given and what PPO is given."""
    rows = [{"q": f"Wie alt, {n}?", "a": f"Älter als {n} 😀"} for n in range(4)]
    turns = [("user", "q"), ("assistant", "a")]
    lines = [json.dumps({**row, "chat": [{"role": r, "content": row[k]} for r, k in turns]}) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    keys = {"prompt": "{q}\n", "completion": "a"} if kind == "text" else {"messages": "chat", "system": "Sei kurz."}
    parts = {"train": "train[:2]", "validation": "train[2:3]", "test": "train[3:]"}
    task = load_task("columns", Config(path=str(tmp_path / "data.jsonl"), **parts, **keys))
    tokenizer = chat_tokenizer(tokenizer, "eos and newline")
    prompts = encode_prompts(tokenizer, task.train["prompt"])
    trained_on = sft_dataset(tokenizer, task.train)
    for row, prompt, text in zip(trained_on, prompts, task.train["completion"], strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert decode(tokenizer, [row["input_ids"][len(prompt) :]]) == [text]
        assert "Wie alt" in tokenizer.decode(prompt)


def test_tokens_of_examples_are_found_in_the_cache_by_a_later_stage(tokenizer, tmp_path, monkeypatch):
    lines = [json.dumps({"q": f"Wie alt, {n}?", "a": "Älter"}) for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    parts = {"train": "train[:2]", "validation": "train[2:3]", "test": "train[3:]"}
    config = Config(path=str(tmp_path / "data.jsonl"), prompt="{q}\n", completion="a", **parts)
    first = load_task("columns", config).train
    ids = encode_prompts_of(tokenizer, first)
    assert ids == encode_prompts(tokenizer, first["prompt"])
    assert ids == encode_prompts_of(tokenizer, Dataset.from_dict({"prompt": first["prompt"][:]}))  # in memory
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *_, **__: pytest.fail("tokenised again"))
    assert encode_prompts_of(tokenizer, load_task("columns", config).train) == ids
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        encode_prompts_of(tokenizer, load_task("columns", dataclasses.replace(config, prompt="{q}!")).train)
