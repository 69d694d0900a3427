"""The end of a text is learnt with every kind of chat template: loss on the answer and its end, on nothing else."""

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.models.from_scratch import train_tokenizer
from pipeline.models.text import encode_prompts
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments
from pipeline.trainers.huggingface.sft_data import sft_dataset

TURN = "{% if add_generation_prompt %}{{ 'ASSISTANT' }}{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + TURN.replace("ASSISTANT", "<|im_start|>assistant\n")
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' }}"
    "{{ m.content | trim + '<|eot|>' }}{% endfor %}" + TURN.replace("ASSISTANT", "<|header|>assistant<|/header|>\n\n")
)
NAMED_MODEL = (  # another name for the assistant, and an end of the turn that is not EOS
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end>\n' }}{% endfor %}" + TURN.replace("ASSISTANT", "<turn>model\n")
)
INSTRUCTION = (  # no generation prompt: an answer follows the end of an instruction
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NEWLINES = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}" + (
    TURN.replace("ASSISTANT", "<|assistant|>\n")
)
END_TAG = (  # a line break and a tag end a turn, and EOS ends the text
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + '\n' }}{% endfor %}" + (
    TURN.replace("ASSISTANT", "ASSISTANT: ")
)
# Template, EOS of its tokenizer, what SFT learns of the answer "four five".
SHAPES = {
    "chatml": (CHATML, "<|im_end|>", "four five<|im_end|>"),
    "chatml of a base model": (CHATML, "<eos>", "four five<|im_end|>\n<eos>"),
    "headers": (HEADERS, "<|eot|>", "four five<|eot|>"),
    "headers of a base model": (HEADERS, "<eos>", "four five<|eot|><eos>"),
    "another name of the assistant": (NAMED_MODEL, "<eos>", "four five<end>\n<eos>"),
    "instruction": (INSTRUCTION, "<eos>", " four five<eos>"),
    "line break after the end": (NEWLINES, "<eos>", "four five<eos>"),
    "end tag and EOS": (END_TAG, "<eos>", "four five<|end|>\n<eos>"),
    "no end": (NO_END, "<eos>", "four five\n<eos>"),
}
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]
CHAT += [{"role": "user", "content": "2 + 3?"}]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<turn>", "<end>", "<|user|>"]
SPECIAL += ["<|assistant|>", "<|end|>"]


def tokenizer_of(shape: str, base: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with the template, the EOS as its padding: what is padded must not hide what is learnt."""
    template, eos, _ = SHAPES[shape]
    tokenizer = base or train_tokenizer(["2 + 2? 2 + 3? four five user assistant model INST : \n"], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token = tokenizer.pad_token = eos if eos != "<eos>" else tokenizer.eos_token
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_taken_on_the_answer_and_its_end_alone(shape, examples):
    tokenizer, rows = tokenizer_of(shape), examples.select(range(1))
    row = {"prompt": [CHAT], "completion": ["four five"], "references": [["four five"]]}
    [example] = sft_dataset(tokenizer, type(rows).from_dict(row))
    learnt = [label for label in example["labels"] if label != -100]
    expected = SHAPES[shape][2].replace("<eos>", tokenizer.eos_token)
    assert (
        tokenizer.decode(learnt).replace(" ", "") == expected.replace(" ", "") and learnt[-1] == tokenizer.eos_token_id
    )
    # What has no loss is what generation begins with, token for token.
    [prompt] = encode_prompts(tokenizer, [CHAT])
    assert example["labels"][: len(prompt)] == [-100] * len(prompt) and example["input_ids"] == prompt + learnt


@pytest.mark.parametrize("shape", ["chatml", "another name of the assistant"])
def test_a_padded_batch_keeps_the_end_where_padding_is_eos(shape, taught, tmp_path, examples, fresh_accelerate):
    tokenizer, model = tokenizer_of(shape), taught()
    model.resize_token_embeddings(len(tokenizer))
    row = {"prompt": [CHAT, CHAT[:1]], "completion": ["four five", "four"], "references": [["four"]] * 2}
    rows = type(examples).from_dict(row)
    arguments = sft_arguments({"per_device_train_batch_size": 2, "bf16": False, "max_length": 64}, tmp_path, 0)
    trainer = build_sft_trainer(model, arguments, tokenizer, rows, rows, None, tmp_path / "metrics.jsonl")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert (batch["input_ids"][1] == tokenizer.pad_token_id).sum() > 1  # the shorter one is padded
    for labels in batch["labels"].tolist():
        assert [label for label in labels if label != -100][-1] == tokenizer.eos_token_id
        assert labels.count(tokenizer.eos_token_id) == 1
