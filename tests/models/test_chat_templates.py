"""Chat templates as models have them: what they add to answers, dates, settings, tools, and what they leave out."""

import shutil
from datetime import datetime

import pytest
from transformers import GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast

from pipeline.models import text as text_module
from pipeline.models.config import ModelConfig
from pipeline.models.from_scratch import train_tokenizer
from pipeline.models.loading import load_tokenizer
from pipeline.models.text import (
    chat_problems,
    decode,
    encode_completions,
    encode_prompts,
    render_chat,
    set_chat_template,
    without_thoughts,
    writes_date,
)

USER = [{"role": "user", "content": "2 + 2?"}]
START = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}" + START
# An empty thought before the last answer; with enable_thinking: false it is a part of the prompt.
THINK = """{%- for m in messages %}
{{- '<|' + m['role'] + '|>' }}
{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- m['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + PLAIN
TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] or '' }}{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}"
    "{% endfor %}{{ eos_token }}{% endfor %}" + START
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLED = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]


def tokenizer_with(template) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["2 + 2? 4 four <think> </think>"], 300)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [THINK, THINK.replace("+ eos_token", "+ ' (end)' + eos_token"), PLAIN])
def test_what_the_template_adds_to_every_answer_is_no_part_of_it(template):
    tokenizer = tokenizer_with(template)
    [ids] = encode_completions(tokenizer, [USER], ["four"])
    assert ("</think>" in tokenizer.decode(ids)) == (template != PLAIN)  # it is learnt all the same
    assert decode(tokenizer, [ids]) == ["four"]
    empty = tokenizer("<think>\n\n", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [empty]) == ["<think>" if template == PLAIN else ""]
    thought = tokenizer("<think>\nhm\n</think>\n\nfour", add_special_tokens=False)["input_ids"]
    assert "hm" in decode(tokenizer, [thought])[0]
    assert decode(tokenizer, [thought], strip_thoughts=True) == ["four"]


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("<think>a</think> b", "b"),
        ("<think>a", ""),
        ("b <think>a</think>", "b <think>a</think>"),
        ("b", "b"),
        ("a\n</think>\n\nb", "b"),  # the prompt began it
        ("<think></think> b </think>", "b </think>"),
    ],
)
def test_thoughts_at_the_start_are_stripped(text, bare):
    assert without_thoughts(text) == bare


OPEN = PLAIN.replace("'<|assistant|>' }}{% endif", "'<|assistant|><think>\\n' }}{% endif")  # as DeepSeek's


def test_a_thought_that_the_prompt_begins_is_a_thought():
    tokenizer, answer = tokenizer_with(OPEN), "<think>\nhm\n</think>\n\nfour"
    [prompt], [ids] = encode_prompts(tokenizer, [USER]), encode_completions(tokenizer, [USER], [answer])
    assert tokenizer.decode(prompt).endswith("<think>\n") and not tokenizer.decode(ids).startswith("<think>")
    assert decode(tokenizer, [ids]) == [answer]  # as its reference
    assert decode(tokenizer, [ids], strip_thoughts=True) == ["four"]
    plain = tokenizer("four", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [plain]) == decode(tokenizer, [plain], strip_thoughts=True) == ["four"]
    [problem] = chat_problems(tokenizer, [USER], ["four"])  # the template lacks the end of the thought
    assert "renders a prompt differently" in problem


def test_a_thought_that_the_template_begins_in_prompts_and_answers():
    begun = OPEN.replace("+ '|>' + m", "+ '|>' + ('<think>\\n' if m['role'] == 'assistant' else '') + m")
    tokenizer, answer = tokenizer_with(begun), "hm\n</think>\n\nfour"
    [ids] = encode_completions(tokenizer, [USER], [answer])
    assert decode(tokenizer, [ids]) == [answer]
    assert decode(tokenizer, [ids], strip_thoughts=True) == ["four"] == [without_thoughts(answer)]


@pytest.mark.parametrize("value", [False, True, None, 3, "it's {{ 'x' }} %} 😀", ["a", 1], {"k": [True]}])
def test_settings_are_written_into_the_template(value):
    template = "{{ setting is defined }} {{ setting | tojson }}|{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = tokenizer_with(template)
    expected = tokenizer.apply_chat_template(USER, tokenize=False, setting=value)
    set_chat_template(tokenizer, None, {"setting": value})
    assert render_chat(tokenizer, USER) == expected
    set_chat_template(tokenizer, None, {"setting": "other"})
    assert "other" in render_chat(tokenizer, USER)
    set_chat_template(tokenizer, None, {"setting": value})
    assert tokenizer.chat_template.count("set setting") == 1 and render_chat(tokenizer, USER) == expected


def test_a_recipes_template_and_settings_are_saved_with_the_model(tmp_path, base_directory):
    config = ModelConfig(str(base_directory), chat_template=THINK, chat_template_kwargs={"enable_thinking": False})
    tokenizer = load_tokenizer(base_directory, config)
    rendered = render_chat(tokenizer, USER, generation_prompt=True)
    assert rendered.endswith("<think>\n\n</think>\n\n")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((base_directory / "config.json").read_text())
    saved = load_tokenizer(tmp_path, ModelConfig(str(tmp_path)))
    assert render_chat(saved, USER, generation_prompt=True) == rendered
    again = load_tokenizer(tmp_path, ModelConfig(str(tmp_path), chat_template_kwargs={"enable_thinking": False}))
    assert again.chat_template == saved.chat_template
    [ids] = encode_completions(saved, [USER], ["four"])
    assert decode(saved, [ids]) == ["four"] and "think" not in saved.decode(ids)


@pytest.mark.parametrize("after", ["", " + eos_token"])
def test_a_turn_ends_where_generation_ends_it(tmp_path, base_directory, after):
    """As Gemma and Phi-3 have it: a token ends the turn that is not EOS, and a line break follows, or that and EOS."""
    shutil.copytree(base_directory, tmp_path, dirs_exist_ok=True)
    tokenizer = load_tokenizer(base_directory, ModelConfig(str(base_directory)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = PLAIN.replace("+ eos_token", f"+ '<end_of_turn>\\n'{after}")
    tokenizer.save_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    endings = []
    for eos in ([tokenizer.eos_token_id, end], tokenizer.eos_token_id):
        GenerationConfig(eos_token_id=eos).save_pretrained(tmp_path)
        saved = load_tokenizer(tmp_path, ModelConfig(str(tmp_path)))
        [ids] = encode_completions(saved, [USER], ["four"])
        assert decode(saved, [ids]) == ["four"]
        endings.append((ids[-1], end in ids))
    assert endings == [(end, True), (tokenizer.eos_token_id, True)]  # generation has to reach one that ends it


def test_settings_without_a_template_or_with_names_of_no_variable_are_refused(base_directory):
    with pytest.raises(ValueError, match=r"model\.chat_template_kwargs: they would do nothing"):
        load_tokenizer(base_directory, ModelConfig(str(base_directory), chat_template_kwargs={"a": 1}))
    for name in ("messages", "a b"):
        with pytest.raises(ValueError, match=r"model\.chat_template_kwargs: "):
            ModelConfig("x", chat_template_kwargs={name: 1})


def test_the_date_of_a_template_is_the_same_on_every_day():
    tokenizer = tokenizer_with(DATED)
    assert writes_date(tokenizer) and not writes_date(tokenizer_with(PLAIN))
    assert render_chat(tokenizer, USER).startswith(f"Today: {text_module.TEMPLATE_DATE:%d %b %Y}<")
    assert f"{datetime.now():%d %b %Y}" not in render_chat(tokenizer, USER)


def test_tools_and_their_calls_reach_the_template():
    tokenizer = tokenizer_with(TOOLS)
    prompt = [{**USER[0], "tools": [CALL]}]
    assert tokenizer.decode(encode_prompts(tokenizer, [prompt])[0]).count('"add"') == 1
    [ids] = encode_completions(tokenizer, [prompt], [CALLED])
    assert decode(tokenizer, [ids]) == ['<call>{"name": "add", "arguments": {"a": 2}}</call>']


@pytest.mark.parametrize(("prompt", "completion"), [(USER, CALLED), ([{**USER[0], "tools": [CALL]}], "4")])
def test_a_template_that_leaves_out_tools_or_calls_is_refused(prompt, completion):
    tokenizer = tokenizer_with(PLAIN.replace("m['content']", "(m['content'] or '')"))
    assert chat_problems(tokenizer, [USER, "plain"], ["4", "4"]) == [None, None]
    [problem] = chat_problems(tokenizer, [prompt], [completion])
    assert "leaves out the tool" in problem and "add" in problem and "model.chat_template" in problem


ZEPHYR = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant', 'system') %}{{ '<|' + m['role'] + '|>\n' }}"
    "{{ m['content'] | trim | replace('&', '&amp;') + eos_token }}{% endif %}{% endfor %}" + START
)


@pytest.mark.parametrize(
    ("role", "advice"), [("human", "human: user}"), ("developer", "developer: system}"), ("system", "another model")]
)
def test_a_template_that_leaves_out_a_message_is_refused(role, advice):
    template = ZEPHYR.replace(", 'system'", "") if role == "system" else ZEPHYR
    chats = [[{"role": role, "content": "Add."}, *USER], [{"role": "user", "content": " 2 & 2? "}]]
    problem, none = chat_problems(tokenizer_with(template), chats, ["4", "4"])
    assert f"leaves out the message of the role {role!r}" in problem and advice in problem
    assert none is None  # a text that is written in another way is not left out


def test_a_space_in_front_of_every_text_is_not_put_in_front_of_an_answer():
    """SentencePiece's `▁yes` begins a text; after the `\n` of a generation prompt the model has learnt `yes`."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz?<>|", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes")]
    vocabulary = ["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = LlamaTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, merges=merges)
    assert tokenizer.tokenize("yes") == ["▁yes"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "ok?"}]
    (prompt,), (answer,) = encode_prompts(tokenizer, [chat]), encode_completions(tokenizer, [chat], ["yes"])
    assert tokenizer.convert_ids_to_tokens(answer) == ["yes", "</s>"]
    whole = render_chat(tokenizer, [*chat, {"role": "assistant", "content": "yes"}])
    assert tokenizer(whole, add_special_tokens=False)["input_ids"][: len(prompt) + len(answer)] == prompt + answer
