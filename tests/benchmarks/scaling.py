"""How PPO and SFT scale from one process to two: `python tests/benchmarks/scaling.py [--kind ppo] [--steps 3]`.

Every process has one thread. *Strong* is one batch shared by two processes against the same batch in one; *weak* is as
much work for each of two processes as one alone has. Beside them stand two processes at once that know nothing of
each other: what they lose, cores that share a memory lose; the rest is communication and waiting. All in alternation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
KINDS = ("ppo", "sft")
# name -> (processes of a group, groups at once, batch of each process in parts of the small one)
CASES = {"alone": (1, 1, 1), "alone, twice the batch": (1, 1, 2), "two": (2, 1, 1), "two apart": (1, 2, 1)}


def specification(kind: str, model: Path, batch: int, steps: int) -> dict:
    """What a worker is told; as in ppo_vs_trl.py, with completions of a fixed length."""
    return {
        "kind": kind,
        "model": str(model),
        "prompts": [[3 + (row * 7 + i) % 250 for i in range(16)] for row in range(512)],
        "attention": "eager",
        "batch": batch,
        "micro_batch": 8,
        "epochs": 4,
        "steps": steps,
        "response_length": 32,
        "forced": True,
        "bf16": False,
        "temperature": 1.0,
        "threads": 1,
        "seed": 0,
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    }


def work(spec: dict) -> list[float]:
    """Seconds of each step of this process, without the first."""
    if spec["kind"] == "ppo":
        from relay_worker import run

        return json.loads(run(spec))["wall"]
    return supervised(spec)


def supervised(spec: dict) -> list[float]:
    """Steps of SFT on all weights: prompts of 16 tokens, completions of 32."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

    torch.set_num_threads(spec["threads"])
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            marks.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    texts = tokenizer.batch_decode(spec["prompts"])
    rows = Dataset.from_dict({"prompt": texts, "completion": [text + text for text in texts]})
    settings = {"max_steps": spec["steps"] + 1, "per_device_train_batch_size": spec["micro_batch"], "bf16": False}
    settings |= {"gradient_accumulation_steps": spec["batch"] // spec["micro_batch"], "gradient_checkpointing": False}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
    with tempfile.TemporaryDirectory() as directory:
        arguments = sft_arguments(settings, Path(directory), spec["seed"])
        model = AutoModelForCausalLM.from_pretrained(spec["model"], attn_implementation="eager", dtype=torch.float32)
        file = Path(directory) / "metrics.jsonl"
        trainer = build_sft_trainer(model, arguments, tokenizer, rows, rows, None, file)
        trainer.add_callback(Clock())
        trainer.train()
    return [later - earlier for earlier, later in pairwise(marks)]


def measure(spec: dict, processes: int, groups: int) -> list[float]:
    """Seconds of each step, those of the slowest process, in `groups` groups of processes at once.

    Raises:
        RuntimeError: a worker failed; its error follows.
    """
    with tempfile.TemporaryDirectory() as directory:
        places = [Path(directory) / str(number) for number in range(groups)]
        started = [_start({**spec, "out": str(place)}, place, processes) for place in places]
        for worker in started:
            said = worker.communicate()[0]
            if worker.returncode:
                raise RuntimeError(f"a worker failed:\n{said[-4000:]}")
        found = [json.loads(file.read_text()) for place in places for file in sorted(place.glob("*.json"))]
    return [max(step) for step in zip(*found, strict=True)]


def _start(spec: dict, place: Path, processes: int) -> subprocess.Popen:
    place.mkdir()
    file = place / "spec"
    file.write_text(json.dumps(spec))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    fixed = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    fixed |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
    command = [sys.executable, *(launch if processes > 1 else []), str(HERE / "scaling.py"), "--worker", str(file)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **fixed}
    )


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Strong speed-up (2 is perfect), weak efficiency and that of two apart (1 is perfect)."""
    return {
        "strong": seconds["alone, twice the batch"] / seconds["two"],
        "weak": seconds["alone"] / seconds["two"],
        "apart": seconds["alone"] / seconds["two apart"],
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a table; returns the ratios of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append", help="both, if it is not given")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run, behind one to warm up")
    parser.add_argument("--batch", type=int, default=16, help="episodes or examples of a process")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        spec = json.loads(args.worker.read_text())
        found = work(spec)
        (Path(spec["out"]) / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return {}
    from ppo_scaling import build

    results = {}
    print("kind  case                     seconds a step: median (range)")
    with tempfile.TemporaryDirectory() as directory:
        model = build(Path(directory) / "model", 2000, args.width)
        for kind in args.kind or KINDS:
            times: dict[str, list[float]] = {name: [] for name in CASES}
            for _ in range(args.repetitions):
                for name, (processes, groups, parts) in CASES.items():
                    spec = specification(kind, model, args.batch * parts, args.steps)
                    times[name] += measure(spec, processes, groups)
            for name, found in times.items():
                print(f"{kind:5s} {name:24s} {median(found):.3f} ({min(found):.3f} to {max(found):.3f})")
            results[kind] = ratios({name: median(found) for name, found in times.items()})
            print(
                f"{kind:5s} " + ", ".join(f"{name} {value:.2f}" for name, value in results[kind].items()), flush=True
            )
    return results


if __name__ == "__main__":
    main()
