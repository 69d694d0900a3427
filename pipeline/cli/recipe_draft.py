"""The text of a new recipe, with a comment on what a user is likely to change."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.metrics import METRIC_NAMES

SCRATCH = "scratch"  # in place of a model: random weights, and a tokenizer of the data
RAW_KEYS = ("messages_from",)  # of a task, whose values are mappings
LIMITS = {"max_validation_examples": "200", "max_test_examples": "1000"}
COMMENTS = {
    "data_dir": "where relative paths start: the folder of this file",
    "train": "the data is one file, and the splits are parts of it",
    "prompt": "what the model reads; {names} in braces are filled from the data",
    "completion": "what SFT learns, and what answers are compared with",
    "references": "the right answers; SFT learns the first",
    "messages": "chats: the last answer is the completion",
    "language": "of the answers: metrics choose their tokenizer by it",
    "max_validation_examples": "SFT's loss and PPO's held-out reward are measured on these",
    "max_test_examples": "what the report scores; small differences need 1,000",
}
MODELS = {
    True: """\
  from_scratch:                # random weights, and a tokenizer of the training data
    architecture: llama
    hidden_size: 128
    num_hidden_layers: 3
    num_attention_heads: 4
    vocab_size: 2000
    max_position_embeddings: 512
  lora_r: 16                   # rank of the adapter that PPO trains""",
    False: """\
  model_name_or_path: {model}
  lora_r: 16                   # rank of the adapters that SFT and PPO train""",
}
SFT = {
    True: """\
  num_train_epochs: 3
  learning_rate: 2e-3
  per_device_train_batch_size: 32""",
    False: """\
  num_train_epochs: 2
  learning_rate: 2e-4          # of an adapter; without one (use_peft: false) about 2e-5
  per_device_train_batch_size: 8""",
}
SCRATCH_RATE = "  learning_rate: 5e-4          # the default, 3e-5, is for pretrained models\n"
TEXT = """\
# SFT, then PPO, then a report that says whether PPO beat SFT. What is not here has a default.
#   relay check {file}     # the plan; no run begins
#   relay run {file}
name: {name}
seed: 0
model:
{model}
task:
{task}
sft:
{sft}
ppo:
  rewards:                     # several are weighted and added
{rewards}
{rate}  total_episodes: 10240        # answers that PPO writes; more of them take longer and may gain more
eval:
  metrics: [{metrics}]    # the first decides the verdict
"""


@dataclass(frozen=True)
class Draft:
    """What a user has chosen: `model` is a folder, an id or SCRATCH, `keys` are those of the task section."""

    name: str
    file: str
    model: str
    task: str
    keys: Mapping[str, str]
    rewards: tuple[str, ...]

    @property
    def is_from_scratch(self) -> bool:
        """Tell whether the model has random weights."""
        return self.model == SCRATCH


def draft_text(draft: Draft) -> str:
    """Write the recipe."""
    keys = {"name": draft.task, "data_dir": "{recipe_dir}", **draft.keys}
    for key, size in LIMITS.items():
        keys.setdefault(key, size)
    lines = [f"  {key}: {_value(key, value)}" for key, value in keys.items()]
    comments = [COMMENTS.get(key) for key in keys]
    task = [
        line if comment is None else f"{line:<30} # {comment}" for line, comment in zip(lines, comments, strict=True)
    ]
    return TEXT.format(
        file=draft.file,
        name=draft.name,
        model=MODELS[draft.is_from_scratch].replace("{model}", json.dumps(draft.model, ensure_ascii=False)),
        task="\n".join(task),
        sft=SFT[draft.is_from_scratch],
        rewards="\n".join(f"    - {{name: {_value('name', reward)}, weight: 1.0}}" for reward in draft.rewards),
        rate=SCRATCH_RATE if draft.is_from_scratch else "",
        metrics=", ".join(_metrics(draft)),
    )


def _metrics(draft: Draft) -> list[str]:
    """Return the metrics of the rewards, and another one beside them."""
    chosen = [reward for reward in draft.rewards if reward in METRIC_NAMES]
    first = "bleu" if draft.task == "parallel" else "rougeL"
    return list(dict.fromkeys([*(chosen or [first]), "chrf"]))


def _value(key: str, value: str) -> str:
    """Write a value as YAML: as it is where it is a number, true, false, null or a name, else as a text in quotes."""
    if (
        key in RAW_KEYS
        or re.fullmatch(r"true|false|null|-?\d+", value)
        or re.fullmatch(r"[a-z_][a-zA-Z0-9_.]*", value)
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
