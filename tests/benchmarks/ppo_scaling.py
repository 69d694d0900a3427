"""How PPO's time and memory grow: `python tests/benchmarks/ppo_scaling.py [--points 3]`.

One quantity at a time is doubled from a base case, each in a fresh process; the slopes are least squares of the
logarithms. Weights are random and completions forced to full length, so that the arithmetic is known.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from ppo_vs_trl import HERE, measure

BASE = {"response": 32, "batch": 32, "vocabulary": 2000, "width": 128}
QUANTITIES = tuple(BASE)


def operations(response: int, batch: int, vocabulary: int, width: int, prompt: int = 16, epochs: int = 4) -> float:
    """Multiplications and additions of one PPO step: generation, two scoring passes, `epochs` passes there and back.

    A trunk of four layers has 12 width^2 weights each; the head is multiplied at completion tokens alone.
    """
    trunk, head = 2 * 4 * 12 * width**2, 2 * width * vocabulary
    attention = 4 * 4 * width * (prompt + response) / 2
    forward = batch * ((prompt + response) * (trunk + attention) + response * head)
    return forward * (1 + 2 + 2 * epochs)


def slope(sizes: list[float], values: list[float]) -> float:
    """The exponent b of values = a sizes^b, by least squares of logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def build(directory: Path, vocabulary: int, width: int) -> Path:
    """A random Llama of four layers, and any tokenizer: the prompts are made of ids."""
    sys.path.insert(0, str(HERE.parent.parent))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.models.from_scratch import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a few words"], 300)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Print a table; returns quantity -> slopes of CPU time, of counted operations and of memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=3, help="sizes of each quantity: base, twice, four times, ...")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args(argv)
    slopes = {}
    print(
        "quantity    sizes                     CPU s a step              MB above imports          time  count memory"
    )
    for quantity in QUANTITIES:
        cases = [BASE | {quantity: BASE[quantity] * 2**power} for power in range(args.points)]
        runs = [_run(case, args.steps) for case in cases]
        sizes = [case[quantity] for case in cases]
        seconds = [min(run["cpu"]) for run in runs]
        memory = [run["memory"] / 1e6 for run in runs]
        counted = [operations(**case) for case in cases]
        slopes[quantity] = (slope(sizes, seconds), slope(sizes, counted), slope(sizes, memory))
        lists = (json.dumps([round(value, 2) for value in values]) for values in (sizes, seconds, memory))
        print(f"{quantity:11s} " + " ".join(f"{text:25s}" for text in lists), end=" ")
        print(" ".join(f"{value:5.2f}" for value in slopes[quantity]), flush=True)
    return slopes


def _run(case: dict[str, int], steps: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        spec = {
            "model": str(build(Path(directory) / "model", case["vocabulary"], case["width"])),
            "prompts": [[3 + (row * 7 + i) % 250 for i in range(16)] for row in range(case["batch"] * 2)],
            "attention": "eager",
            "batch": case["batch"],
            "micro_batch": 16,
            "epochs": 4,
            "steps": steps,
            "response_length": case["response"],
            "forced": True,
            "bf16": False,
            "temperature": 1.0,
            "threads": 1,
            "seed": 0,
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        }
        return measure(sys.executable, "relay_worker.py", spec)


if __name__ == "__main__":
    main()
