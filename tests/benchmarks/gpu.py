"""Relay on one GPU against TRL: `python tests/benchmarks/gpu.py [--json FILE] [--trl12 PYTHON_OR_FOLDER]`.

PPO against TRL 1.12's `PPOTrainer`, completions without a value function against TRL 1.16's `RLOOTrainer`, ways to
write completions, SFT against TRL's `SFTTrainer`, and an evaluation against its own decodes. Every side runs once, in
a process of its own, on a model of random weights. All load together and are measured one after the other. Sides that
are compared have the same prompts, LoRA rank and length. Each first step warms up and is not counted; the evaluation
counts its loading. All together takes a few minutes, and up to 70 GB of the GPU: TRL's PPO alone 34.
TRL 1.12 runs in an environment of its own: `--trl12` names its Python, or a folder that holds the package alone, for
a machine without a network. `--device cpu --tiny` shows that the script works.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
READY = "ready"  # what a worker says by `measuring.wait_for_turn`
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SMOLLM = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GROUPED = {"generations": 4, "epochs": 1}  # four completions of each prompt, and no value function
# side -> (worker, model, what its specification has of its own)
SIDES = {
    "Relay, PPO": ("relay_worker.py", "qwen", {}),
    "TRL 1.12 PPOTrainer": ("trl_worker.py", "qwen", {}),
    "Relay, 4 completions of a prompt": ("relay_worker.py", "qwen", GROUPED),
    "TRL RLOOTrainer": ("gpu_worker.py trl_rloo", "qwen", GROUPED),
    "TRL RLOOTrainer, continuous batching": ("gpu_worker.py trl_rloo", "qwen", {**GROUPED, "continuous": True}),
    "Generation": ("gpu_worker.py generation", "qwen", {}),
    "Relay, SFT": ("gpu_worker.py sft", "smollm", {}),
    "TRL SFTTrainer": ("gpu_worker.py trl_sft", "smollm", {}),
    "Relay, evaluation of three models": ("gpu_worker.py evaluation", "smollm", {}),
}


def build(directory: Path, sizes: dict[str, int], dtype: str, device: str) -> Path:
    """A Llama of random weights, and a tokenizer with a word for each id, so that prompts have known lengths."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(sizes["vocab_size"] - 3))]
    rules = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=rules, padding_side="left", **special).save_pretrained(directory)
    torch.manual_seed(0)
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(**sizes, **ends, tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device(device):
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    if device == "cuda":
        torch.cuda.empty_cache()  # for the workers
    return directory


def specification(args: argparse.Namespace, model: Path, vocabulary: int) -> dict:
    """What all workers are told."""
    chance, tiny = random.Random(0), args.tiny
    length = 8 if tiny else 128
    return {
        "model": str(model),
        "prompts": [[chance.randrange(3, vocabulary) for _ in range(length)] for _ in range(16 if tiny else 256)],
        "attention": "sdpa",
        "batch": 8 if tiny else 64,
        "micro_batch": 4 if tiny else 16,
        "epochs": 4,
        "steps": args.steps,
        "response_length": 6 if tiny else 128,
        "forced": True,
        "bf16": args.device == "cuda",
        "dtype": "bfloat16" if args.device == "cuda" else "float32",
        "device": args.device,
        "temperature": 1.0,
        "threads": 1,
        "seed": 0,
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        "sft_tokens": 2 * length,
        "sft_batch": 4 if tiny else 16,
        "sft_steps": 1 if tiny else 10,
        "eval_texts": 8 if tiny else 618,
        "eval_tokens": 6 if tiny else 64,
    }


class Side:
    """One side in a process of its own."""

    def __init__(self, name: str, spec: dict, trl12: Path | None, folder: Path) -> None:
        """Start it. TRL 1.12's is not started without its environment."""
        worker, _, own = SIDES[name]
        python, path, self.process = sys.executable, [str(ROOT), str(HERE)], None
        if worker == "trl_worker.py":
            if trl12 is None:
                return
            python, path = (python, [str(trl12), str(HERE)]) if trl12.is_dir() else (str(trl12), [str(HERE)])
        cuda = spec["device"] == "cuda"
        fixed = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
        fixed |= {"ACCELERATE_USE_CPU": str(not cuda).lower()} | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
        script, *arguments = worker.split()
        file = folder / f"{list(SIDES).index(name)}.json"
        file.write_text(json.dumps(spec | own | {"takes_turns": True}))
        self._errors, pipe = file.with_suffix(".log"), subprocess.PIPE
        command = [python, str(HERE / script), *arguments, str(file)]
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env={**os.environ, **fixed}
            )

    def load(self) -> None:
        """Wait until it has loaded what it needs, or has failed."""
        while self.process is not None and self.process.stdout.readline() not in (f"{READY}\n", ""):
            pass

    def measure(self) -> dict:
        """Give it its turn; its report, or `error` alone: a side that fails must not cost the others."""
        if self.process is None:
            return {"error": "no environment of TRL 1.12; name one with --trl12"}
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        written = self.process.stdout.read()
        if self.process.wait():
            lines = self._errors.read_text().strip().splitlines() or ["no message"]
            return {"error": " ".join(lines[-1].split())[:300]}
        return json.loads(written.splitlines()[-1])


def rows(side: str, report: dict) -> list[list[str]]:
    """The lines of a side in the table."""
    if "error" in report:
        return [[side, report["error"], "", "", ""]]
    memory = "" if report["memory"] is None else f"{report['memory'] / 1e9:.1f}"
    speed = report.get("tokens_a_second")
    if isinstance(speed, dict):
        return [[f"{side}: {way}", "", "", f"{value:,.0f}", memory] for way, value in speed.items()]
    if speed is not None:
        return [[side, "", "", f"{speed:,.0f}", memory]]
    episodes = report["batch"] * len(report["wall"]) / sum(report["wall"])
    written = report["batch"] * report["length"] / max(1e-9, report["generate_seconds"])
    shares = ", ".join(f"{share:.0%}" for share in report["wall_share"].values())
    return [[side, f"{episodes:.1f}", shares, f"{written:,.0f}", memory]]


def machine(device: str) -> str:
    """The name of what everything runs on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run the sides, print the table; returns each side's report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights: a smoke test")
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after one to warm up")
    parser.add_argument("--side", action="append", choices=list(SIDES), help="all; continuous batching on a GPU alone")
    parser.add_argument("--trl12", type=Path, help="the Python of an environment with TRL 1.12, or a folder with it")
    parser.add_argument("--json", type=Path, help="write every report here")
    args = parser.parse_args(argv)
    start, reports, sides = time.perf_counter(), {}, {}
    print("| side | episodes/s | generate, score, update | tokens/s | peak GB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        specs = {}
        for side in args.side or [side for side in SIDES if args.device == "cuda" or "continuous" not in side]:
            name = SIDES[side][1]
            if name not in specs:
                sizes = TINY if args.tiny else {"qwen": QWEN, "smollm": SMOLLM}[name]
                dtype = "bfloat16" if args.device == "cuda" else "float32"
                model = build(Path(directory) / name, sizes, dtype, args.device)
                specs[name] = specification(args, model, sizes["vocab_size"])
            sides[side] = Side(side, specs[name], args.trl12, Path(directory))
        for side in sides.values():
            side.load()
        for side in sides:
            reports[side] = sides[side].measure()
            for row in rows(side, reports[side]):
                print("| " + " | ".join(row) + " |", flush=True)
    seconds = time.perf_counter() - start
    print(f"\n{machine(args.device)}, {seconds:.0f} seconds; tokens/s of written tokens, or of SFT's tokens")
    if args.json:
        about = {"device": machine(args.device), "seconds": seconds, "tiny": args.tiny, "steps": args.steps}
        args.json.write_text(json.dumps({"about": about, "reports": reports}, indent=1))
    return reports


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE)]
    main()
