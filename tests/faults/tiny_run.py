"""A tiny recipe over a few sentence pairs, and what a program says and returns for it."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

from pipeline import eval as eval_stage
from pipeline import ppo as ppo_stage
from pipeline import reward as reward_stage
from pipeline import run
from pipeline import sft as sft_stage

STAGES = {"sft": sft_stage, "reward": reward_stage, "ppo": ppo_stage, "eval": eval_stage}
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "run.py": run.main,
    **{f"{name}.py": stage.main for name, stage in STAGES.items()},
}
MODEL = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 300, max_position_embeddings: 64}"
RECIPE = """\
name: tiny
output_dir: OUTPUT
model: {from_scratch: MODEL}
task: TASK
sft: {num_train_epochs: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
ppo:
  rewards: [bleu]
  total_episodes: 4
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  response_length: 8
eval: {metrics: [bleu], samples_per_prompt: 0, num_inspected: 0}
"""
COLUMNS = """{name: columns, path: '{split}.jsonl', data_dir: DATA, prompt: "{english}\\n", completion: german}"""
PARALLEL = "{name: parallel, source: '{split}.en', target: '{split}.de', data_dir: DATA}"
ROWS = [
    {"english": english, "german": german}
    for english, german in (
        ("a dog", "ein Hund"),
        ("the cat", "die Katze"),
        ("bread", "Brot"),
        ("a bird", "ein Vogel"),
    )
]


def write_rows(folder: Path, rows: Sequence[object] = ROWS, splits: Sequence[str] = ("train", "validation", "test")):
    """Each split as JSON lines; a row that is a text or bytes is a line as it is."""
    for split in splits:
        lines = [row if isinstance(row, bytes) else _line(row).encode() for row in rows]
        (folder / f"{split}.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def _line(row: object) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def write_parallel(folder: Path) -> None:
    """Each split as two text files."""
    for split in ("train", "validation", "test"):
        for side, column in (("en", "english"), ("de", "german")):
            (folder / f"{split}.{side}").write_text("".join(f"{row[column]}\n" for row in ROWS), encoding="utf-8")


LETTERS = (("a", "x"), ("b", "y"), ("c", "z"), ("a b", "x y"), ("b c", "y z"), ("c a", "z x"))
LETTERS_RECIPE = {
    "name": "tiny",
    "model": {
        "from_scratch": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 270},
    },
    "task": {"name": "parallel", "source": "{split}.en", "target": "{split}.de"},
    "sft": {"num_train_epochs": 1, "per_device_train_batch_size": 3, "gradient_checkpointing": False},
    "ppo": {"rewards": ["bleu"], "per_device_train_batch_size": 2, "response_length": 4},
    "eval": {"metrics": ["bleu"], "samples_per_prompt": 0, "num_inspected": 0},
}


def tiny_recipe(folder: Path, pairs: Sequence[tuple[str, str]] = LETTERS, **sections: dict[str, object]) -> Path:
    """Write a recipe over pairs of short texts, whose data and runs are in `folder`; `sections` adds keys to some."""
    for split in ("train", "validation", "test"):
        for side, texts in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (folder / f"{split}.{side}").write_text("\n".join(texts) + "\n", encoding="utf-8")
    recipe = deepcopy(LETTERS_RECIPE) | {"output_dir": str(folder / "runs")}
    for section, keys in ({"task": {"data_dir": str(folder)}} | sections).items():
        recipe[section] = recipe.get(section, {}) | keys
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
    return path


def write_recipe(folder: Path, task: str = COLUMNS, text: str = RECIPE, model: str = MODEL) -> str:
    """The path of a recipe in `folder`, whose data and runs are there too."""
    text = text.replace("TASK", task).replace("MODEL", model).replace("DATA", str(folder))
    path = folder / "recipe.yaml"
    path.write_text(text.replace("OUTPUT", str(folder / "runs")), encoding="utf-8")
    return str(path)


def outcome(main: Callable[[Sequence[str]], int], *arguments: str) -> int:
    """The exit code of a program, however it ends."""
    try:
        return main(list(arguments))
    except SystemExit as exit:
        return int(exit.code or 0)


def only_error(text: str) -> str:
    """The one sentence on stderr that says what is wrong."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]
